//! The stand on this machine: several instances behind a real nginx, scraped by a real Prometheus.
//!
//! Where one of the two is missing, these tests show as ignored, with the reason.

#![allow(clippy::unwrap_used)]

mod command;
mod events;
mod faults;

use std::path::Path;

use box_office::{Level, Strategy};
use harness::{
    backends::{NginxSettings, on_system_path},
    rush::Program,
};
use libtest_mimic::{Arguments, Completion, Trial};
use tokio::runtime::Runtime;

fn main() {
    let rushes = [
        ("lv1/read-then-write", command::Sold::TooMany),
        ("lv2/mutex", command::Sold::TooMany),
        ("lv2/pessimistic", command::Sold::AsMany),
        ("lv2/conditional-update", command::Sold::AsMany),
        ("lv3/rlock", command::Sold::AsMany),
        ("lv3/fenced", command::Sold::AsMany),
        ("lv4/locked", command::Sold::AsMany),
        ("lv4/single-writer", command::Sold::AsMany),
    ];
    let rushes = rushes.map(|(name, sold)| {
        test(&format!("a_rush_through_nginx_is_judged::{name}"), async move || {
            command::a_rush_through_nginx_is_judged(name, sold);
        })
    });
    let levels: [(&'static Level, &str); 4] = [
        (&lv1_race_condition::LEVEL, "read-then-write"),
        (&lv2_db_lock::LEVEL, "pessimistic"),
        (&lv3_redis_lock::LEVEL, "fenced"),
        (&lv4_kafka::LEVEL, "single-writer"),
    ];
    let faults = levels.into_iter().flat_map(|(level, name)| {
        let strategy = level.strategy(name).unwrap();
        [
            test(
                &format!("an_instance_killed_and_one_drained_lose_nothing::{}", level.name),
                async move || faults::an_instance_killed_and_one_drained_lose_nothing(level, strategy).await,
            ),
            test(
                &format!("a_rolling_restart_answers_no_5xx_but_503::{}", level.name),
                async move || faults::a_rolling_restart_answers_no_5xx_but_503(level, strategy).await,
            ),
        ]
    });
    let tests = rushes
        .into_iter()
        .chain(faults)
        .chain([
            test(
                "a_rush_in_which_nobody_is_killed_says_nothing_of_kills",
                faults::a_rush_in_which_nobody_is_killed_says_nothing_of_kills,
            ),
            test(
                "with_all_instances_down_a_buyer_is_told_503_as_a_problem",
                faults::with_all_instances_down_a_buyer_is_told_503_as_a_problem,
            ),
            test(
                "an_event_passes_nginx_before_the_stream_ends_and_the_stream_survives_a_reload",
                events::an_event_passes_nginx_before_the_stream_ends_and_the_stream_survives_a_reload,
            ),
            test(
                "the_stand_serves_until_ctrl_c_and_leaves_nothing",
                command::the_stand_serves_until_ctrl_c_and_leaves_nothing,
            ),
            test("a_port_that_is_taken_is_one_clear_line", async || {
                command::a_port_that_is_taken_is_one_clear_line();
            }),
            test("a_missing_prometheus_is_one_clear_line", async || {
                command::a_missing_prometheus_is_one_clear_line();
            }),
        ])
        .collect();
    let mut arguments = Arguments::from_args();
    // Rushes would load each other.
    arguments.test_threads.get_or_insert(1);
    libtest_mimic::run(&arguments, tests).exit();
}

fn test<F: Future<Output = ()>>(name: &str, run: impl FnOnce() -> F + Send + 'static) -> Trial {
    Trial::ignorable_test(name, move || {
        for program in ["nginx", "prometheus"] {
            if on_system_path(program).is_none() {
                return Ok(Completion::ignored_with(format!(
                    "needs {program}: infra/test-tools.sh"
                )));
            }
        }
        Runtime::new()?.block_on(run());
        Ok(Completion::Completed)
    })
}

fn nginx() -> NginxSettings {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    NginxSettings {
        executable: on_system_path("nginx").unwrap(),
        template: root.join("infra/stand/nginx/nginx.conf.template"),
        port: None,
    }
}

/// A server of this level, in which a dead instance is expelled from its group, and its lock expires, soon.
fn program(level: &Level) -> Program {
    Program::new(env!("CARGO_BIN_EXE_oversold"))
        .argument("serve")
        .argument(level.name)
        .variable("KAFKA_SESSION_MS", "1000")
        .variable("LOCK_LEASE_MS", "2000")
}

fn single_writer() -> &'static Strategy {
    lv4_kafka::LEVEL.strategy("single-writer").unwrap()
}
