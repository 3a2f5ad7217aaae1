//! What infra/stand/compose.sh says where a stand cannot start: one line, before anything is started.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command};

use tempfile::TempDir;

use crate::repository;

/// A folder of programs that hides those of this machine, but for the shell's own.
struct Programs(TempDir);

impl Programs {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["sh", "dirname", "id", "sed"] {
            let program = ["/usr/bin", "/bin"].map(|folder| Path::new(folder).join(name));
            let program = program.iter().find(|program| program.exists()).unwrap();
            std::os::unix::fs::symlink(program, folder.path().join(name)).unwrap();
        }
        Self(folder)
    }

    /// A program that runs this shell script.
    fn with(self, name: &str, script: &str) -> Self {
        let file = self.0.path().join(name);
        fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        self
    }

    /// What `up LEVEL` says, which has to be one line and exit code 3.
    fn refusal(&self, level: &str) -> String {
        let output = Command::new("/bin/sh")
            .arg(repository().join("infra/stand/compose.sh"))
            .args(["up", level])
            .env_clear()
            .env("PATH", self.0.path())
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(3), "{said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{said}");
        assert!(output.stdout.is_empty());
        said
    }
}

/// An engine with this much memory, and a Compose plugin of this version.
fn engine(memory: u64, compose: &str) -> String {
    format!(
        "case \"$*\" in
         version) ;;
         'compose version --short') echo {compose} ;;
         'info --format {{{{.MemTotal}}}}') echo {memory} ;;
         *) exit 1 ;;
         esac"
    )
}

const ENOUGH: u64 = 8_000_000_000;

pub(crate) fn what_keeps_a_stand_from_starting_is_one_clear_line() {
    let without_docker = Programs::new().refusal("lv1");
    assert!(without_docker.contains("there is no docker"), "{without_docker}");

    let without_engine = Programs::new().with("docker", "exit 1").refusal("lv1");
    assert!(without_engine.contains("no Docker engine answers"), "{without_engine}");
    assert!(without_engine.contains("oversold -- stand"), "{without_engine}");

    let without_compose = Programs::new().with("docker", "[ \"$1\" = version ]").refusal("lv1");
    assert!(
        without_compose.contains("there is no Docker Compose"),
        "{without_compose}"
    );

    for (version, accepted) in [("1.28.6", false), ("1.29.2", true), ("v2.39.1", true), ("10.0.0", true)] {
        let programs = Programs::new().with("docker", &engine(0, version));
        let said = programs.refusal("lv1");
        // The next thing to be missing is memory.
        let expected = if accepted {
            "MB of memory"
        } else {
            "has to be 1.29 or newer"
        };
        assert!(said.contains(expected), "{version}: {said}");
    }

    let little = Programs::new()
        .with("docker", &engine(2_000_000_000, "2.39.1"))
        .refusal("lv4");
    assert!(
        little.contains("2000 MB of memory, and the stand takes 3 GB"),
        "{little}"
    );

    let unknown = Programs::new().with("docker", &engine(ENOUGH, "2.39.1")).refusal("lv5");
    assert!(
        unknown.contains("there is no level lv5; there are lv1 lv2 lv3 lv4"),
        "{unknown}"
    );
}
