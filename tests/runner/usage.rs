//! Bad input: one clear line, and exit code 2.

use rstest::rstest;

use crate::{command, err, out, oversold};

#[rstest]
#[case::no_such_level(&["rush", "lv9"], "oversold: there is no level \"lv9\"; there is lv1, lv2")]
#[case::no_such_strategy(&["trace", "lv1/luck"], "oversold: lv1 has no strategy \"luck\"; it has read-then-write, check-then-decrement, check-then-insert")]
#[case::no_such_level_of_a_contract(&["red", "lv9"], "oversold: there is no level \"lv9\"")]
#[case::no_such_strategy_of_a_contract(&["red", "lv1/luck"], "oversold: lv1 has no strategy \"luck\"")]
#[case::no_such_exercise(&["exercise", "lv9-luck"], "oversold: there is no exercise \"lv9-luck\"; there is lv1-one-statement")]
#[case::two_exercises(&["exercise", "lv2-read-again", "lv1-unique-index"], "oversold: one exercise at a time")]
#[case::no_diff(&["source", "lv2/pessimistic", "--diff"], "oversold: lv2/pessimistic is not a mutant: it has no diff")]
#[case::source_of_nothing(&["source"], "<LEVEL/STRATEGY> is missing")]
#[case::no_tickets(&["rush", "--capacity", "0"], "a number, 1 to 1000000")]
#[case::too_many_buyers(&["rush", "--buyers", "1e9"], "a number, 1 to 20000")]
#[case::too_many_at_once(&["rush", "lv3/spin", "--buyers", "2000", "--clicks", "10"], "20000 connections at once; 1 instance(s) take 8184")]
#[case::too_many_instances(&["rush", "--instances", "17"], "a number, 1 to 16")]
#[case::no_such_option(&["rush", "--byers", "3"], "--byers")]
#[case::no_such_command(&["sell"], "sell")]
#[case::a_stand_of_no_level(&["stand", "lv9"], "oversold: there is no level \"lv9\"")]
#[case::a_stand_of_two_strategies(&["stand", "lv2/mutex", "--strategy", "optimistic"], "oversold: lv2/mutex names a strategy already: leave out --strategy")]
#[case::a_stand_without_instances(&["stand", "lv1", "--instances", "0"], "a number, 1 to 16")]
#[case::a_stand_whose_tickets_nobody_holds(&["stand", "lv4/locked", "--payments", "approve"], "oversold: --payments is given, but lv4/locked holds no tickets")]
#[case::a_stand_at_no_port(&["stand", "lv1", "--nginx-port", "0"], "a port number, 1 to 65535")]
#[case::a_judged_rush_without_prometheus(&["stand", "lv1", "--rush", "--prometheus-port", "9090"], "--rush")]
#[case::a_size_of_nobody(&["size", "--buyers", "0", "--minutes", "10"], "a number, 1 to 1000000000")]
#[case::a_size_of_no_time(&["size", "--buyers", "5", "--minutes", "0"], "a number, 1 to 1440")]
#[case::a_size_without_buyers(&["size", "--minutes", "10"], "--buyers")]
#[case::a_peak_beyond_all_buyers(&["size", "--buyers", "5", "--minutes", "2", "--peak", "3"], "oversold: --peak 3: the busiest of 2 minutes brings at most 2 times the mean")]
#[case::a_size_of_what_oversells(&["size", "--buyers", "5", "--minutes", "2", "--level", "lv2/mutex"], "oversold: lv2/mutex breaks I1, I2 on several instances: there is no size at which it sells right")]
#[case::a_size_of_no_level(&["size", "--buyers", "5", "--minutes", "2", "--level", "lv9"], "oversold: there is no level \"lv9\"")]
#[case::no_such_file(&["judge", "nowhere.jsonl"], "oversold: opening nowhere.jsonl: No such file")]
#[case::json_into_nowhere(&["rush", "lv1", "--json", "no/such/folder/x.json"], "oversold: writing no/such/folder/x.json")]
#[case::no_such_buyer(&["trace", "lv1", "--order", "AXB"], "letters A, B, C for the buyers")]
#[case::one_request(&["trace", "lv1", "--order", "AA"], "of at least two requests")]
#[case::capacity_of_nothing(&["trace", "lv1", "--capacity", "2"], "--order")]
#[case::consumers_have_no_trace(&["trace", "lv4"], "oversold: there is no trace of lv4/locked: its orders are decided by consumers")]
#[case::bench_of_nothing(&["bench"], "LEVEL/STRATEGY")]
#[case::bench_of_no_such_strategy(&["bench", "lv2/luck"], "oversold: lv2 has no strategy \"luck\"")]
#[case::bench_without_clients(&["bench", "lv2", "--clients", "0"], "a number, 1 to 4000")]
#[case::bench_of_no_pools(&["bench", "lv2", "--pools", "1,none"], "a number, 1 to 400")]
#[case::waiters_without_a_lock(&["bench", "lv2/mutex", "--waiters", "1000"], "only LV.3 has one: lv3/spin, lv3/rlock, lv3/fenced")]
#[case::waiters_for_a_broken_lock(&["bench", "lv3/mutants/lock-by-buyer", "--waiters", "9"], "lv3/mutants/lock-by-buyer is none of them")]
#[case::a_lock_on_its_own_without_one(&["bench", "lv1", "--lock"], "only LV.3 has one")]
#[case::processes_without_waiters(&["bench", "lv3/rlock", "--instances", "3"], "--waiters <N>")]
#[case::more_processes_than_waiters(&["bench", "lv3/rlock", "--waiters", "2", "--instances", "3"], "each of the --instances needs at least one of the --waiters")]
#[case::no_waiters(&["bench", "lv3/rlock", "--waiters", "0"], "a number, 1 to 20000")]
#[case::alone_and_in_a_crowd(&["bench", "lv3/rlock", "--lock", "--waiters", "9"], "'--lock' cannot be used with '--waiters <N>'")]
#[case::a_session_that_kafka_does_not_take(&["serve", "lv4", "--kafka-session-ms", "300001"], "KAFKA_SESSION_MS (--kafka-session-ms) holds \"300001\"; expected a number of milliseconds, 500 to 300000")]
#[case::a_lease_that_is_none(&["serve", "lv3", "--lock-lease-ms", "9"], "LOCK_LEASE_MS (--lock-lease-ms) holds \"9\"; expected a number of milliseconds, 10 to 600000")]
#[case::a_prefix_of_two_words(&["serve", "lv3", "--redis-prefix", "two words"], "REDIS_PREFIX")]
#[case::a_redis_that_is_none(&["serve", "lv3", "--redis-url", "http://localhost"], "REDIS_URL (--redis-url) holds an invalid value (not shown: it is a secret)")]
#[case::an_improvement_of_another_level(&["serve", "lv3", "--order-ttl-ms", "100"], "ORDER_TTL_MS (--order-ttl-ms) is set, but lv3/spin does not support it: message TTL")]
#[case::a_ttl_that_is_none(&["serve", "lv4", "--order-ttl-ms", "0"], "ORDER_TTL_MS (--order-ttl-ms) holds \"0\"; expected a number of milliseconds, 1 to 86400000")]
#[case::a_rush_without_its_improvement(&["rush", "lv4/single-writer", "lv2/mutex", "--rate-limit", "5"], "oversold: RATE_LIMIT (--rate-limit) is set, but lv2/mutex does not support it: rate limiting")]
#[case::payments_that_are_none(&["rush", "lv4/single-writer", "--payments", "aprove=1"], "--payments holds \"aprove=1\"; expected weights as in approve=90,decline=8,hang=2, not all of them 0")]
#[case::vips_where_nobody_has_priority(&["rush", "lv4", "--vip", "50"], "--vip is given, but lv4/locked has no priority; lv4/single-writer does")]
#[case::no_vips(&["rush", "lv4/single-writer", "--vip", "0"], "a number, 1 to 20000")]
#[case::more_vips_than_buyers(&["rush", "lv4/single-writer", "--vip", "51", "--buyers", "50"], "--vip is 51, but there are only 50 --buyers")]
#[case::a_priority_that_is_none(&["rush", "lv4/single-writer", "--order-priority", "101"], "ORDER_PRIORITY (--order-priority) holds \"101\"; expected the number of VIP orders for each other order, 1 to 100")]
#[case::payments_where_nothing_is_held(&["rush", "lv4/locked", "--payments", "approve"], "--payments is given, but lv4/locked holds no tickets; lv4/single-writer does")]
#[case::payments_of_a_level_without(&["rush", "lv4", "lv2", "--payments", "approve"], "--payments is given, but lv2 holds no tickets; lv4/single-writer does")]
#[case::two_payment_services(&["rush", "lv4", "--payments", "approve", "--payment-url", "http://127.0.0.1:1"], "'--payments <NAME=WEIGHT,…>' cannot be used with '--payment-url <URL>'")]
#[case::a_hold_in_a_rush_that_ends_before_the_payment(&["rush", "lv4", "--payments", "approve", "--hold-ms", "1000"], "HOLD_MS (--hold-ms) is 1000, and PAYMENT_TIMEOUT_MS (--payment-timeout-ms) 1000")]
#[case::a_ttl_in_a_rush_that_ends_before_the_payment(&["rush", "lv4", "--payments", "approve", "--ttl-ms", "999"], "ORDER_TTL_MS (--order-ttl-ms) is 999, and PAYMENT_TIMEOUT_MS (--payment-timeout-ms) 1000")]
#[case::a_hold_without_payments(&["rush", "lv4/single-writer", "--hold-ms", "1000"], "HOLD_MS (--hold-ms) is set, but PAYMENT_URL (--payment-url) is not")]
#[case::more_for_one_than_for_all(&["serve", "lv4", "--rate-limit", "5", "--rate-limit-per-buyer", "6"], "RATE_LIMIT_PER_BUYER (--rate-limit-per-buyer) is 6, and RATE_LIMIT (--rate-limit) only 5 for all buyers")]
#[case::the_price_of_an_improvement_elsewhere(&["bench", "lv2/mutex", "--rate-limit", "5"], "oversold: what an improvement costs is measured where LV.4 accepts orders")]
#[case::orders_that_wait_elsewhere(&["bench", "lv2/mutex", "--drain", "100"], "only LV.4 has one: lv4/locked, lv4/single-writer")]
#[case::payments_of_no_backlog(&["bench", "lv4/single-writer", "--payments", "approve"], "what payments cost is measured where a backlog is processed: add --drain")]
#[case::payments_where_nothing_is_held(&["bench", "lv4/locked", "--drain", "--payments", "approve"], "--payments is given, but lv4/locked holds no tickets")]
#[case::no_orders_that_wait(&["bench", "lv4", "--drain", "0"], "a number, 1 to 500000")]
#[case::answers_that_wait_for_no_pool(&["bench", "lv4", "--pools", "1,2"], "those of LV.4 do not")]
#[case::dead_letters_of_nobody(&["dead-letters"], "oversold: KAFKA_BOOTSTRAP_SERVERS (--kafka-bootstrap-servers) is not set; expected the addresses of Kafka brokers, such as localhost:9092")]
#[case::dead_letters_of_no_broker(&["dead-letters", "--kafka-bootstrap-servers", "localhost"], "KAFKA_BOOTSTRAP_SERVERS (--kafka-bootstrap-servers) holds \"localhost\"; expected the addresses")]
#[case::a_dead_letter_without_origin(&["dead-letters", "show"], "<ORIGIN> is missing")]
#[case::an_order_of_nothing(&["trace", "lv1", "--order"], "oversold: --order is empty; expected a value")]
#[case::a_port_that_is_none(&["serve", "lv1", "--port", "eighty"], "PORT")]
fn bad_input_is_one_clear_line_and_exit_code_2(#[case] arguments: &[&str], #[case] says: &str) {
    let output = command(arguments)
        .env_remove("KAFKA_BOOTSTRAP_SERVERS")
        .output()
        .unwrap();
    let stderr = err(&output);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains(says), "{stderr}");
    assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
    assert!(out(&output).is_empty(), "{}", out(&output));
}

#[test]
fn without_a_command_it_shows_its_help() {
    let output = oversold(&[]);
    assert_eq!(output.status.code(), Some(2));
    for subcommand in [
        "rush",
        "bench",
        "serve",
        "stand",
        "size",
        "trace",
        "red",
        "exercise",
        "source",
        "judge",
        "list",
        "dead-letters",
        "doctor",
    ] {
        assert!(err(&output).contains(&format!("  {subcommand} ")), "{}", err(&output));
    }
}

#[test]
fn a_bad_setting_is_one_clear_line_and_exit_code_2() {
    let output = command(&["rush", "lv1"])
        .env("OVERSOLD_BACKENDS", "podman")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(
        err(&output),
        "oversold: OVERSOLD_BACKENDS is `podman`; expected `docker` or `native`\n"
    );
}

#[test]
fn bench_says_what_it_takes() {
    let output = oversold(&["bench", "--help"]);
    assert_eq!(output.status.code(), Some(0));
    for option in [
        "--clients",
        "--seconds",
        "--rounds",
        "--pool ",
        "--pools",
        "--lock",
        "--waiters",
        "--instances",
        "--drain",
        "--json",
    ] {
        assert!(out(&output).contains(option), "{}", out(&output));
    }
}
