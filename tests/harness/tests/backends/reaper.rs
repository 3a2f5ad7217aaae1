//! The reaper: nothing is left behind, however the program ends; after a killed reaper, the next
//! run cleans up.

use std::{
    env, fs,
    net::TcpStream,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::{Command, Stdio},
};

use harness::backends::{Source, reaper};
use rustix::process::{Signal, kill_process};

use crate::{
    Test,
    child::{End, Role, container_exists, names_in, processes, temp, until},
    of_one, repository,
    service::Service,
    test,
};

pub(crate) fn tests() -> Vec<Test> {
    let mut tests = vec![
        of_one(
            "a_folder_whose_owner_lives_is_not_swept",
            Service::Postgres,
            &[Source::Native],
            a_folder_whose_owner_lives_is_not_swept,
        ),
        of_one(
            "a_process_that_was_given_an_old_pid_is_left_alone",
            Service::Postgres,
            &[],
            a_process_that_was_given_an_old_pid_is_left_alone,
        ),
        of_one(
            "a_process_that_ignores_the_signal_is_killed",
            Service::Postgres,
            &[],
            a_process_that_ignores_the_signal_is_killed,
        ),
        of_one(
            "a_process_that_ignores_ctrl_c_is_told_to_end",
            Service::Postgres,
            &[],
            a_process_that_ignores_ctrl_c_is_told_to_end,
        ),
        of_one(
            "a_registry_stays_while_an_entry_of_it_does",
            Service::Postgres,
            &[],
            a_registry_stays_while_an_entry_of_it_does,
        ),
        of_one(
            "a_program_that_starts_after_the_end_gives_up",
            Service::Postgres,
            &[],
            a_program_that_starts_after_the_end_gives_up,
        ),
    ];
    for source in [Source::Docker, Source::Native] {
        for service in Service::ALL {
            tests.extend(tests_of(service, source));
        }
    }
    tests
}

fn tests_of(service: Service, source: Source) -> Vec<Test> {
    let name = |what: &str| format!("{}::{source}::{what}", service.name());
    let mut tests = Vec::new();
    for end in [End::Exit, End::Panic, End::CtrlC, End::Kill] {
        let name = name(&format!("leaves_nothing_behind_after_{}", end.name()));
        tests.push(test(name, service, &[source], move || {
            nothing_stays_behind(service, source, end);
        }));
    }
    let name = name("is_swept_by_the_next_run_when_its_reaper_was_killed");
    tests.push(test(name, service, &[source], move || {
        the_next_run_sweeps(service, source)
    }));
    tests
}

fn nothing_stays_behind(service: Service, source: Source, end: End) {
    let temp = temp();
    let mut held = Role::new(service, "hold", temp.path()).forced(source).held();
    let pids = held.processes();
    let containers = held.containers();
    let elsewhere = held.elsewhere();
    assert!(elsewhere.iter().all(|folder| folder.exists()), "{elsewhere:?}");
    match source {
        Source::Docker => assert!(containers.iter().all(|name| container_exists(name)) && containers.len() == 1),
        _ => {
            let at_least = if service == Service::Postgres { 5 } else { 2 };
            assert!(
                pids.len() >= at_least,
                "the reaper, the server and its children: {pids:?}"
            );
        }
    }
    TcpStream::connect(held.word("address")).unwrap();

    held.end(end);
    temp.becomes_empty();
    until("every process to end", || {
        processes().iter().all(|process| !pids.contains(&process.pid))
    });
    assert!(TcpStream::connect(held.word("address")).is_err());
    assert!(!containers.iter().any(|name| container_exists(name)), "{containers:?}");
}

fn the_next_run_sweeps(service: Service, source: Source) {
    let temp = temp();
    let mut held = Role::new(service, "hold", temp.path()).forced(source).held();
    let pids = held.processes();
    let containers = held.containers();
    let elsewhere = held.elsewhere();
    assert!(elsewhere.iter().all(|folder| folder.exists()), "{elsewhere:?}");
    kill_process(held.reaper(), Signal::KILL).unwrap();
    held.end(End::Kill);
    TcpStream::connect(held.word("address")).expect("without its reaper, the server outlives its owner");

    Role::new(Service::Postgres, "keep", temp.path()).succeeds();
    temp.becomes_empty();
    until("every process to end", || {
        processes().iter().all(|process| !pids.contains(&process.pid))
    });
    assert!(!containers.iter().any(|name| container_exists(name)), "{containers:?}");
}

fn a_folder_whose_owner_lives_is_not_swept() {
    let temp = temp();
    let mut held = Role::new(Service::Postgres, "hold", temp.path())
        .forced(Source::Native)
        .held();
    kill_process(held.reaper(), Signal::KILL).unwrap();
    Role::new(Service::Postgres, "keep", temp.path()).succeeds();
    until("the other run's folder to go", || names_in(temp.path()).len() == 1);
    TcpStream::connect(held.word("address")).expect("the server is untouched");

    held.end(End::Exit);
    Role::new(Service::Postgres, "keep", temp.path()).succeeds();
    temp.becomes_empty();
}

fn a_process_that_was_given_an_old_pid_is_left_alone() {
    let temp = temp();
    let mut bystander = Command::new("sleep").arg("1000").process_group(0).spawn().unwrap();
    let stale = temp.path().join("oversold-run-stale");
    fs::create_dir_all(stale.join("pids")).unwrap();
    fs::write(stale.join("owner"), "").unwrap();
    fs::write(stale.join("pids/postgres-0"), format!("{} 1\n", bystander.id())).unwrap();
    Role::new(Service::Postgres, "keep", temp.path()).succeeds();
    temp.becomes_empty();
    let ended = bystander.try_wait().unwrap();
    bystander.kill().unwrap();
    bystander.wait().unwrap();
    assert_eq!(ended, None);
}

fn a_process_that_ignores_the_signal_is_killed() {
    let temp = temp();
    let report = Role::new(Service::Postgres, "stubborn", temp.path()).json();
    let pid = u32::try_from(report["pid"].as_u64().unwrap()).unwrap();
    temp.becomes_empty();
    until("the stubborn process to end", || {
        processes().iter().all(|process| process.pid != pid)
    });
}

/// It is not killed: a service that is told may end in order.
fn a_process_that_ignores_ctrl_c_is_told_to_end() {
    let temp = tempfile::tempdir().unwrap();
    let (registry, ready) = (temp.path().join("registry"), temp.path().join("ready"));
    fs::create_dir_all(registry.join("pids")).unwrap();
    let reaper = || {
        let mut command = Command::new("sh");
        command.arg(repository().join("tests/harness/src/backends/reaper.sh"));
        command.stdin(Stdio::null());
        command
    };
    let mut process = reaper()
        .arg("run")
        .arg(&registry)
        .args(["kafka-1", "sh", "-c"])
        .arg("trap '' INT; trap 'exit 7' TERM; : >\"$0\"; while :; do sleep 0.05; done")
        .arg(&ready)
        .process_group(0)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    until("the process to ignore Ctrl-C", || ready.exists());
    assert!(reaper().arg("clear").arg(&registry).status().unwrap().success());
    assert_eq!(process.wait().unwrap().code(), Some(7));
    assert!(!registry.exists());
}

/// `docker`, `rm` and `sleep` are stubs here that a file controls, so retries take no time.
fn a_registry_stays_while_an_entry_of_it_does() {
    let temp = tempfile::tempdir().unwrap();
    let (registry, programs) = (temp.path().join("registry"), temp.path().join("programs"));
    let (container, elsewhere) = (
        registry.join("containers/oversold-kafka-1"),
        registry.join("elsewhere/data-1"),
    );
    fs::create_dir(&programs).unwrap();
    for (name, script) in [
        ("sleep", ""),
        (
            "docker",
            r#"case "$(cat "$0.is") $*" in
               "away "* | "stubborn "*" rm "*) exit 1 ;;
               "empty "*" inspect "*) exit 1 ;;
               "stubborn "*" ls "*) echo 0123456789ab ;;
               esac"#,
        ),
        ("rm", r#"case "$*" in *resists*) exit 1 ;; esac; exec /bin/rm "$@""#),
    ] {
        let program = programs.join(name);
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let path = format!("{}:{}", programs.display(), env::var("PATH").unwrap());
    let clear = |engine_is: &str| {
        fs::write(programs.join("docker.is"), engine_is).unwrap();
        let mut command = Command::new("sh");
        command.arg(repository().join("tests/harness/src/backends/reaper.sh"));
        command.arg("clear").arg(&registry).env("PATH", &path);
        let cleared = command.stdin(Stdio::null()).output().unwrap().status.success();
        assert_eq!(cleared, !registry.exists());
        cleared
    };
    let write = |data: &Path| {
        for entry in [&container, &elsewhere] {
            fs::create_dir_all(entry.parent().unwrap()).unwrap();
        }
        fs::create_dir_all(data).unwrap();
        fs::write(&container, "\n").unwrap();
        fs::write(&elsewhere, format!("{}\n", data.display())).unwrap();
    };

    let data = temp.path().join("data");
    for engine_is in ["away", "stubborn"] {
        write(&data);
        assert!(!clear(engine_is));
        assert!(
            container.exists() && !elsewhere.exists() && !data.exists(),
            "{engine_is}"
        );
        assert!(clear("well"));
    }

    // The container was registered, and its creator died before it was created.
    write(&data);
    assert!(clear("empty"));

    let data = temp.path().join("data-resists");
    write(&data);
    assert!(!clear("well"));
    assert!(elsewhere.exists() && !container.exists());
    let yields = temp.path().join("data-yields");
    fs::rename(&data, &yields).unwrap();
    fs::write(&elsewhere, format!("{}\n", yields.display())).unwrap();
    assert!(clear("well"));
    assert!(!yields.exists());
}

/// The reaper cleans up while a process that was just started has not registered yet.
fn a_program_that_starts_after_the_end_gives_up() {
    // Not this process's own registry, which other tests use concurrently.
    let folder = reaper::folder("probe").unwrap();
    let proof = folder.join("it-ran");
    let script = repository().join("tests/harness/src/backends/reaper.sh");
    let run = || {
        let mut command = Command::new("sh");
        command.arg(&script).arg("run").arg(&folder).arg("touch-0").arg("touch");
        command.arg(&proof).stderr(Stdio::null()).status().unwrap()
    };

    fs::create_dir(folder.join("pids")).unwrap();
    assert!(run().success());
    fs::remove_file(&proof).unwrap();

    // As the reaper does.
    fs::rename(folder.join("pids"), folder.join("pids.closed")).unwrap();
    assert!(!run().success());
    assert!(!proof.exists());
}
