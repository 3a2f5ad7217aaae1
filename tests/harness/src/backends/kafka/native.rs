//! Kafka as a native process: Java, and the jars that `infra/kafka/fetch.sh` downloads.

use std::{env, fmt::Write as _, fs, path::PathBuf};

use anyhow::{Context, bail};
use rustix::process::{Signal, geteuid};

use super::{CLUSTER_ID, SERVICE, settings};
use crate::backends::{
    free_port,
    native::{Home, Memory, Process, on_path},
    setting,
};

const JARS_VARIABLE: &str = "OVERSOLD_KAFKA_JARS";
const LOG_SETTINGS: &str = include_str!("log4j2.properties");

/// Formats a data folder. The process is not started yet.
pub(super) fn prepare() -> anyhow::Result<Process> {
    let (jars, java) = (jars()?, java()?);
    let home = Home::make(SERVICE.name, Memory::Never)?;
    let folder = home.folder().to_owned();
    let log_settings = folder.join("log4j2.properties");
    fs::write(&log_settings, LOG_SETTINGS)?;
    let file = folder.join("server.properties");
    let content = move |port: u16, controller: u16| {
        let mut content = format!(
            "process.roles=broker,controller\n\
             node.id=1\n\
             controller.quorum.voters=1@127.0.0.1:{controller}\n\
             controller.listener.names=CONTROLLER\n\
             listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}\n\
             advertised.listeners=PLAINTEXT://127.0.0.1:{port}\n\
             listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT\n\
             log.dirs={}\n",
            folder.join("data").display()
        );
        for (setting, value) in settings() {
            writeln!(content, "{setting}={value}")?;
        }
        anyhow::Ok(content)
    };

    // A class-data-sharing archive beside the jars. It cuts the start-up time to a third; Java
    // ignores an archive of another version.
    let classes = jars.with_extension("jsa");
    let mut class_path = jars.into_os_string();
    class_path.push("/*");
    let mut arguments: Vec<_> = [
        // Short start-up and a small heap: the broker serves one test.
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",
        "-Xmx512m",
        // The files would be in the temporary folder and remain there after a kill.
        "-XX:-UsePerfData",
    ]
    .map(Into::into)
    .into();
    for (property, value) in [
        ("java.io.tmpdir", home.folder()),
        ("log4j2.configurationFile", &log_settings),
    ] {
        arguments.push(format!("-D{property}={}", value.display()).into());
    }
    if classes.is_file() {
        arguments.push(format!("-XX:SharedArchiveFile={}", classes.display()).into());
    }
    arguments.extend(["-cp".into(), class_path]);

    // The ports are not known yet and do not affect the data.
    fs::write(&file, content(1, 2)?)?;
    let formatted = home
        .command(&java)?
        .args(&arguments)
        .args([
            "kafka.tools.StorageTool",
            "format",
            "--cluster-id",
            CLUSTER_ID,
            "--config",
        ])
        .arg(&file)
        .status()?;
    if !formatted.success() {
        bail!("Kafka could not format its data folder ({formatted}): {}", home.log());
    }

    arguments.extend(["kafka.Kafka".into(), file.clone().into_os_string()]);
    let at = move |port: u16| {
        fs::write(&file, content(port, free_port()?)?)?;
        Ok(Vec::new())
    };
    Ok(Process::new(home, java, arguments, Box::new(at))
        // A JVM started in the background of a shell ignores SIGINT.
        .stop_signal(Signal::TERM))
}

/// Finds what Kafka's own programs run with: `java`, and the folder of the jars.
///
/// # Errors
/// Fails if one of them is not on this machine.
pub fn programs() -> anyhow::Result<(PathBuf, PathBuf)> {
    Ok((java()?, jars()?))
}

/// Finds the folder of Kafka's jars.
fn jars() -> anyhow::Result<PathBuf> {
    let holds_kafka = |folder: &PathBuf| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let mut names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        names.any(|name| name.starts_with("kafka_2") && name.ends_with(".jar"))
    };
    if let Some(named) = setting(JARS_VARIABLE).map(PathBuf::from) {
        if !holds_kafka(&named) {
            bail!(
                "{JARS_VARIABLE} is `{}`, which does not hold the jars of Kafka",
                named.display()
            );
        }
        return Ok(named);
    }
    // As in infra/kafka/fetch.sh. A broker started by root runs as another user, who can't read
    // root's home.
    let cache = if geteuid().is_root() {
        Some("/var/cache".into())
    } else {
        let home = || Some(PathBuf::from(setting("HOME")?).join(".cache"));
        setting("XDG_CACHE_HOME").map(PathBuf::from).or_else(home)
    };
    let usual = cache.context("HOME is not set")?.join("oversold/kafka");
    if !holds_kafka(&usual) {
        bail!(
            "the jars of Kafka are not in {}, where infra/setup.sh kafka puts them",
            usual.display()
        );
    }
    Ok(usual)
}

/// Finds `java`.
fn java() -> anyhow::Result<PathBuf> {
    let in_home = |home| PathBuf::from(home).join("bin/java");
    // Homebrew does not link it, and macOS has a stub on PATH that only reports a missing Java.
    let usual = ["/opt/homebrew/opt/openjdk", "/usr/local/opt/openjdk"].map(Into::into);
    let mut homes = env::var_os("JAVA_HOME").into_iter().chain(usual).map(in_home);
    homes
        .find(|java| java.is_file())
        .or_else(|| on_path("java"))
        .context("java is neither in JAVA_HOME nor on PATH, and Kafka needs 17 or later")
}
