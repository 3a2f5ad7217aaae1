//! The choice of a source: forced, invalid, absent or required, with the message of each case.

use std::{fs, path::Path};

use harness::backends::Source;
use serde_json::json;

use crate::{
    Test,
    child::{ROLE, Role, Temp, names_in, temp, text},
    of_each, of_one,
    service::Service,
};

pub(crate) fn tests() -> Vec<Test> {
    use Source::{Docker, Native};

    let mut tests = vec![
        of_one(
            "a_required_source_that_is_absent_fails",
            Service::Postgres,
            &[],
            a_required_source_that_is_absent_fails,
        ),
        of_one(
            "a_bad_list_of_required_sources_is_refused",
            Service::Postgres,
            &[],
            a_bad_list_of_required_sources_is_refused,
        ),
        of_one(
            "an_image_that_cannot_be_pulled_is_tried_once",
            Service::Postgres,
            &[Docker],
            an_image_that_cannot_be_pulled_is_tried_once,
        ),
    ];
    tests.extend(of_each(
        "a_forced_source_wins_over_an_external_one",
        &[Native],
        a_forced_source_wins_over_an_external_one,
    ));
    tests.extend(of_each(
        "every_bad_setting_gets_one_clear_line",
        &[],
        every_bad_setting_gets_one_clear_line,
    ));
    tests.extend(of_each(
        "nothing_there_says_what_was_tried_and_what_to_install",
        &[],
        nothing_there_says_what_was_tried,
    ));
    tests.extend(of_each(
        "an_absent_source_is_ignored_with_its_reason",
        &[],
        an_absent_source_is_ignored_with_its_reason,
    ));
    tests.extend(of_each(
        "without_a_usable_image_a_native_server_takes_over",
        &[Docker, Native],
        without_an_image_native_takes_over,
    ));
    tests
}

fn a_forced_source_wins_over_an_external_one(service: Service) {
    let temp = temp();
    let role = Role::new(service, "find", temp.path());
    let role = role.set(
        service.url_variable(),
        format!("{}://nobody@127.0.0.1:1/0", service.name()),
    );
    let report = role.forced(Source::Native).json();
    assert_eq!(
        (&report["source"], &report["reason"]),
        (&json!("native"), &json!("OVERSOLD_BACKENDS asks for it"))
    );
}

fn every_bad_setting_gets_one_clear_line(service: Service) {
    let (bin, image) = (service.folder_variable(), service.setting("IMAGE"));
    for (setting, value, line) in [
        (
            "OVERSOLD_BACKENDS",
            "podman",
            "OVERSOLD_BACKENDS is `podman`; expected `docker` or `native`",
        ),
        (
            "OVERSOLD_BACKENDS",
            "external",
            "OVERSOLD_BACKENDS is `external`; expected `docker` or `native`",
        ),
    ] {
        let report = Role::new(service, "find", temp().path()).set(setting, value).json();
        assert_eq!(report, json!({ "error": line, "setting": true }));
    }
    for (source, setting, value, part) in [
        (Source::Native, bin.as_str(), "/nowhere", service.not_native()),
        (
            Source::Docker,
            "DOCKER_HOST",
            "unix:///nowhere/docker.sock",
            "no Docker engine answers at unix:///nowhere/docker.sock",
        ),
        (
            Source::Docker,
            "DOCKER_HOST",
            "nonsense",
            "no Docker engine answers at nonsense",
        ),
        (
            Source::Docker,
            image.as_str(),
            "latest:",
            &format!("{image} is `latest:`, which is no name of an image"),
        ),
    ] {
        let report = Role::new(service, "find", temp().path())
            .forced(source)
            .set(setting, value)
            .json();
        let error = report["error"].as_str().unwrap();
        assert!(error.contains(part), "{error}");
    }
}

/// A child for which no source provides a service.
pub(crate) fn nowhere(service: Service, role: &str, temp: &Path) -> Role {
    Role::new(service, role, temp)
        .set("DOCKER_HOST", "unix:///nowhere/docker.sock")
        .set("OVERSOLD_POSTGRES_BIN", "/nowhere")
        .set("OVERSOLD_REDIS_BIN", "/nowhere")
        .set("OVERSOLD_KAFKA_JARS", "/nowhere")
}

fn nothing_there_says_what_was_tried(service: Service) {
    let report = nowhere(service, "find", temp().path()).json();
    let error = report["error"].as_str().unwrap();
    let (tried, remedy) = error.rsplit_once('\n').unwrap();
    assert_eq!(
        tried,
        format!(
            "there is no {}:\
             \n  external: {} is not set\
             \n  docker: no Docker engine answers at unix:///nowhere/docker.sock\
             \n  native: {}",
            service.name(),
            service.url_variable(),
            service.not_native()
        )
    );
    assert!(
        remedy.starts_with("To get one: ") && remedy.ends_with(", or start a Docker engine."),
        "{remedy}"
    );
    assert!(
        remedy.contains("install") && remedy.contains(service.name()),
        "{remedy}"
    );
}

/// This test program on a machine without any source.
fn this_test(temp: &Path, filter: &str) -> Role {
    let mut role = nowhere(Service::Postgres, "", temp);
    role.0.env_remove(ROLE).args(["--exact", filter]);
    role
}

fn an_absent_source_is_ignored_with_its_reason(service: Service) {
    for (source, reason) in [
        ("docker", "no Docker engine answers at unix:///nowhere/docker.sock"),
        ("native", service.not_native()),
    ] {
        let name = format!("{}::{source}::is_gone_when_a_private_one_is_dropped", service.name());
        let output = this_test(temp().path(), &name).succeeds();
        let line = format!("{name} ... ignored (no {source} source: {reason})");
        assert!(text(&output).contains(&line), "{}", text(&output));
        assert!(
            text(&output).contains("0 passed; 0 failed; 1 ignored"),
            "{}",
            text(&output)
        );
    }
}

fn a_required_source_that_is_absent_fails() {
    let output = this_test(temp().path(), "postgres::docker::can_be_durable")
        .set("OVERSOLD_REQUIRE", "native, docker")
        .ends();
    assert_eq!(output.status.code(), Some(101));
    let line = "OVERSOLD_REQUIRE lists docker, but: no Docker engine answers at unix:///nowhere/docker.sock";
    assert!(text(&output).contains(line), "{}", text(&output));

    // A source that is not listed may be absent.
    this_test(temp().path(), "postgres::docker::can_be_durable")
        .set("OVERSOLD_REQUIRE", "native")
        .succeeds();
}

fn a_bad_list_of_required_sources_is_refused() {
    let output = this_test(temp().path(), "postgres::docker::can_be_durable")
        .set("OVERSOLD_REQUIRE", "native,podman")
        .ends();
    assert_eq!(output.status.code(), Some(2));
    let line = "OVERSOLD_REQUIRE lists `podman`; expected `docker` and `native`, with a comma between them\n";
    assert_eq!(String::from_utf8_lossy(&output.stderr), line);
}

const NO_IMAGE: &str = "localhost:1/oversold/none:here";

fn an_image_that_cannot_be_pulled_is_tried_once() {
    let temp = temp();
    let role = || {
        Role::new(Service::Postgres, "find", temp.path())
            .forced(Source::Docker)
            .set("OVERSOLD_POSTGRES_IMAGE", NO_IMAGE)
    };
    for (tried, part) in [(true, "can't be pulled"), (false, "to have it tried again now, delete")] {
        let output = role().succeeds();
        assert!(
            text(&output).contains(&format!("image {NO_IMAGE} is not here, and")),
            "{}",
            text(&output)
        );
        assert!(text(&output).contains(part), "{}", text(&output));
        assert_eq!(text(&output).contains("pulling the image"), tried, "{}", text(&output));
    }
    forget_the_pull(&temp);
}

fn without_an_image_native_takes_over(service: Service) {
    let temp = temp();
    let report = Role::new(service, "find", temp.path())
        .set(service.setting("IMAGE"), NO_IMAGE)
        .json();
    assert_eq!(report["source"], "native");
    let reason = report["reason"].as_str().unwrap();
    let start = format!("{} is not set; image {NO_IMAGE} is not here", service.url_variable());
    assert!(reason.starts_with(&start), "{reason}");
    forget_the_pull(&temp);
}

/// Deletes the note of the failed pull, which is kept on purpose.
fn forget_the_pull(temp: &Temp) {
    let names = names_in(temp.path());
    let note = names
        .iter()
        .find(|name| name.starts_with("oversold-pull-failed-"))
        .expect("there is a note");
    fs::remove_file(temp.path().join(note)).unwrap();
}
