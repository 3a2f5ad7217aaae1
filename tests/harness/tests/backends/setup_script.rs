//! `infra/setup.sh`: its arguments, its messages when nothing can be installed, and the images that
//! it names.

use std::{fs, process::Command};

use harness::backends::Source;

use crate::{Test, child::text, of_each, of_one, repository, service::Service};

pub(crate) fn tests() -> Vec<Test> {
    let mut tests = vec![
        of_one(
            "setup_takes_the_names_of_services",
            Service::Postgres,
            &[],
            setup_takes_the_names_of_services,
        ),
        of_one(
            "setup_names_the_tools_that_a_build_takes",
            Service::Postgres,
            &[],
            setup_names_the_tools_that_a_build_takes,
        ),
        of_one(
            "setup_says_that_kafkas_client_takes_no_space_in_its_path",
            Service::Kafka,
            &[],
            setup_says_that_kafkas_client_takes_no_space,
        ),
    ];
    tests.extend(of_each(
        "setup_is_silent_when_there_is_nothing_to_install",
        &[Source::Native],
        setup_is_silent,
    ));
    tests.extend(of_each(
        "setup_says_what_to_run_where_nothing_can_be_installed",
        &[],
        setup_says_what_to_run,
    ));
    tests.extend(of_each(
        "the_image_is_the_same_everywhere",
        &[],
        the_image_is_the_same_everywhere,
    ));
    tests
}

/// A command for `infra/setup.sh` without settings.
fn setup(services: &[&str]) -> Command {
    let mut setup = Command::new("/bin/sh");
    setup.arg(repository().join("infra/setup.sh")).args(services);
    for setting in [
        "DATABASE_URL",
        "REDIS_URL",
        "OVERSOLD_BACKENDS",
        "OVERSOLD_POSTGRES_IMAGE",
        "OVERSOLD_REDIS_IMAGE",
    ] {
        setup.env_remove(setting);
    }
    setup
}

fn setup_is_silent(service: Service) {
    for (setting, value) in [
        ("OVERSOLD_BACKENDS", "native"),
        (service.url_variable(), "redis://me@db/0"),
    ] {
        let output = setup(&[service.name()]).env(setting, value).output().unwrap();
        assert_eq!(text(&output), "exit status: 0\n", "{setting}");
    }
}

fn setup_takes_the_names_of_services() {
    let output = setup(&["mysql"]).output().unwrap();
    assert_eq!(
        text(&output),
        "exit status: 2\nsetup: there is no service mysql; there are postgres, redis and kafka\n"
    );

    // Without a name, it sets up Postgres only.
    let mut all = setup(&[]);
    all.env("DATABASE_URL", "postgres://me@db/sale")
        .env("OVERSOLD_REDIS_BIN", "/nowhere")
        .env("OVERSOLD_KAFKA_JARS", "/nowhere");
    assert_eq!(text(&all.output().unwrap()), "exit status: 0\n");
}

fn setup_says_what_to_run(service: Service) {
    // With only this program on PATH, nothing can be installed on any machine.
    let path = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/usr/bin/uname", path.path().join("uname")).unwrap();
    let nothing = || {
        let mut setup = setup(&[service.name()]);
        setup
            .env("PATH", path.path())
            .env(service.folder_variable(), "/nowhere");
        setup
    };
    for (forced, code, parts) in [
        (
            "",
            1,
            [
                &format!("there is no {service:?}, and none can be installed from here"),
                "start a Docker engine",
                &format!("export {}=", service.url_variable()),
            ],
        ),
        (
            "docker",
            1,
            ["OVERSOLD_BACKENDS is `docker`", "no Docker engine answers", "start one"],
        ),
        (
            "podman",
            2,
            ["OVERSOLD_BACKENDS is `podman`", "expected `docker` or `native`", ""],
        ),
    ] {
        let output = nothing().env("OVERSOLD_BACKENDS", forced).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", text(&output));
        for part in parts {
            assert!(text(&output).contains(part), "{}", text(&output));
        }
    }
}

fn setup_names_the_tools_that_a_build_takes() {
    let path = tempfile::tempdir().unwrap();
    for program in ["uname", "make"] {
        std::os::unix::fs::symlink(format!("/usr/bin/{program}"), path.path().join(program)).unwrap();
    }
    let mut setup = setup(&["postgres"]);
    setup
        .env("PATH", path.path())
        .env("DATABASE_URL", "postgres://me@db/sale");
    let output = setup.output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    for part in ["there is no c++, ps", "Do this:"] {
        assert!(text(&output).contains(part), "{}", text(&output));
    }
}

fn setup_says_that_kafkas_client_takes_no_space() {
    let folder = tempfile::tempdir().unwrap();
    let checkout = folder.path().join("my oversold");
    fs::create_dir(&checkout).unwrap();
    let copied = Command::new("cp")
        .arg("-R")
        .arg(repository().join("infra"))
        .arg(&checkout)
        .status();
    assert!(copied.unwrap().success());
    let set_up = |services: &[&str], target: Option<&str>| {
        let mut setup = Command::new(checkout.join("infra/setup.sh"));
        setup
            .args(services)
            .env_remove("OVERSOLD_BACKENDS")
            .env("HOME", "/home/ann");
        for (url, value) in [
            ("DATABASE_URL", "postgres://me@db/sale"),
            ("REDIS_URL", "redis://me@db/0"),
            ("KAFKA_BOOTSTRAP_SERVERS", "db:9092"),
        ] {
            setup.env(url, value);
        }
        match target {
            Some(target) => setup.env("CARGO_TARGET_DIR", target),
            None => setup.env_remove("CARGO_TARGET_DIR"),
        };
        text(&setup.output().unwrap())
    };
    let says = |target: &str| {
        format!(
            "exit status: 1\nsetup: Kafka's client can't be built in `{target}`, which has a space in it. \
             Do this: export CARGO_TARGET_DIR=/home/ann/.cache/oversold-target\n"
        )
    };
    let all = ["postgres", "redis", "kafka"];
    let inside = fs::canonicalize(&checkout).unwrap().join("target");
    assert_eq!(set_up(&all, None), says(inside.to_str().unwrap()));
    assert_eq!(set_up(&all, Some("/tmp/my target")), says("/tmp/my target"));
    // What it advises works, and the levels without Kafka need no advice.
    assert_eq!(
        set_up(&all, Some("/home/ann/.cache/oversold-target")),
        "exit status: 0\n"
    );
    assert_eq!(set_up(&["postgres"], None), "exit status: 0\n");
}

fn the_image_is_the_same_everywhere(service: Service) {
    let name = match service {
        Service::Kafka => "apache/kafka-native",
        Service::Postgres => "postgres",
        Service::Redis => "redis",
    };
    let tag = |file: &str, name: &str| {
        let content = fs::read_to_string(repository().join(file)).unwrap();
        let image = format!("{name}:");
        let before = content
            .match_indices(&image)
            .map(|(at, found)| &content[at + found.len()..])
            .find(|tag| tag.starts_with(|c: char| c.is_ascii_digit()));
        let tag = before.unwrap_or_else(|| panic!("{file} names an image"));
        let end = tag
            .find(|c: char| !c.is_ascii_alphanumeric() && !"-.".contains(c))
            .unwrap();
        tag[..end].to_owned()
    };
    let harness = tag(
        &format!("tests/harness/src/backends/{}/docker.rs", service.name()),
        name,
    );
    assert_eq!(tag("infra/setup.sh", name), harness);
    // The same version, with a data folder that a volume can be mounted to.
    let in_compose = name.trim_end_matches("-native");
    assert_eq!(tag("docker-compose.yml", in_compose), harness);
}
