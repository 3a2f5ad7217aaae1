//! The stand of docker-compose.yml: its containers, its nginx, its alerts and dashboards. What a machine has no programs or images for
//! shows as ignored, with the reason. `tests/stand` has the stand of native processes.

#![allow(clippy::unwrap_used)]

mod containers;
mod files;
mod nginx;
mod prometheus;
mod refusals;
mod stub;

use std::path::{Path, PathBuf};

use harness::backends::on_system_path;
use libtest_mimic::{Arguments, Completion, Trial};
use tokio::runtime::Runtime;

fn main() {
    let mut tests = vec![
        test(
            "every_alert_has_a_page_and_a_test",
            &[],
            files::every_alert_has_a_page_and_a_test,
        ),
        test(
            "every_dashboard_is_provisioned_as_it_was_generated",
            &[],
            files::every_dashboard_is_complete,
        ),
        test(
            "every_step_is_in_the_table_of_its_level",
            &[],
            files::every_step_is_in_the_table_of_its_level,
        ),
        test(
            "every_target_of_prometheus_is_a_service",
            &[],
            files::every_target_is_a_service,
        ),
        test(
            "compose_publishes_three_ports_and_no_secret",
            &[],
            files::compose_is_hardened,
        ),
        test(
            "what_keeps_a_stand_from_starting_is_one_clear_line",
            &[],
            refusals::what_keeps_a_stand_from_starting_is_one_clear_line,
        ),
        async_test(
            "a_post_goes_to_another_instance_if_the_first_cannot_be_reached",
            &[NGINX],
            nginx::a_post_goes_to_another_instance_if_the_first_cannot_be_reached,
        ),
        async_test(
            "a_post_that_was_sent_is_not_repeated",
            &[NGINX],
            nginx::a_post_that_was_sent_is_not_repeated,
        ),
        async_test(
            "a_get_is_repeated_at_another_instance",
            &[NGINX],
            nginx::a_get_is_repeated_at_another_instance,
        ),
        async_test(
            "with_all_instances_down_the_answer_is_a_problem",
            &[NGINX],
            nginx::with_all_instances_down_the_answer_is_a_problem,
        ),
        async_test("a_request_id_is_passed_on", &[NGINX], nginx::a_request_id_is_passed_on),
        async_test(
            "no_token_and_no_query_is_logged",
            &[NGINX],
            nginx::no_token_and_no_query_is_logged,
        ),
        async_test(
            "the_metrics_are_not_published",
            &[NGINX],
            nginx::the_metrics_are_not_published,
        ),
        test(
            "the_rules_and_their_tests_are_valid",
            &[PROMTOOL],
            prometheus::the_rules_and_their_tests_are_valid,
        ),
        async_test(
            "every_expression_returns_data_after_a_rush",
            &[PROMETHEUS, NODE_EXPORTER, POSTGRES_EXPORTER, REDIS_EXPORTER],
            prometheus::every_expression_returns_data_after_a_rush,
        ),
    ];
    tests.extend(containers::tests());
    let mut arguments = Arguments::from_args();
    // A stand takes all processors, and its alerts have seconds.
    arguments.test_threads.get_or_insert(1);
    libtest_mimic::run(&arguments, tests).exit();
}

const NGINX: &str = "nginx";
const PROMTOOL: &str = "promtool";
const PROMETHEUS: &str = "prometheus";
const NODE_EXPORTER: &str = "prometheus-node-exporter";
const POSTGRES_EXPORTER: &str = "prometheus-postgres-exporter";
const REDIS_EXPORTER: &str = "prometheus-redis-exporter";

/// A test that needs these programs.
fn test(name: &str, programs: &'static [&str], run: impl FnOnce() + Send + 'static) -> Trial {
    Trial::ignorable_test(name, move || {
        if let Some(missing) = programs.iter().find(|name| on_system_path(name).is_none()) {
            return Ok(Completion::ignored_with(format!(
                "no {missing}: infra/test-tools.sh installs it"
            )));
        }
        run();
        Ok(Completion::Completed)
    })
}

fn async_test<F: Future<Output = ()>>(
    name: &str,
    programs: &'static [&str],
    run: impl FnOnce() -> F + Send + 'static,
) -> Trial {
    test(name, programs, || Runtime::new().unwrap().block_on(run()))
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn stand() -> PathBuf {
    repository().join("infra/stand")
}
