//! Servers from Docker and native programs: their settings, sharing, restarts, and the cleanup of
//! databases, keys and topics.

use harness::backends::Source;

use crate::{
    Test,
    child::{Role, temp},
    service::Service,
    test,
};

/// The services, the name of the test, and the role that runs it.
type RoleTest = (&'static [Service], &'static str, &'static str);

const TESTS: [RoleTest; 11] = [
    (&Service::ALL, "serves_with_the_settings_of_every_source", "serve"),
    (&Service::ALL, "is_shared_by_all_runtimes_of_a_process", "share"),
    (&Service::ALL, "keeps_its_address_when_it_is_stopped_or_killed", "break"),
    (&Service::ALL, "is_gone_when_a_private_one_is_dropped", "private"),
    (
        &[Service::Postgres],
        "gives_each_of_many_at_once_a_database_of_its_own",
        "race",
    ),
    (&[Service::Postgres], "drops_a_database_with_its_last_owner", "drop"),
    (&[Service::Postgres], "can_be_durable", "durable"),
    (&[Service::Redis], "deletes_the_keys_of_a_prefix_with_its_owner", "drop"),
    (
        &[Service::Kafka],
        "deletes_the_topics_of_a_prefix_with_its_owner",
        "drop",
    ),
    (&[Service::Kafka], "answers_again_when_it_was_frozen", "freeze"),
    (&[Service::Redis], "answers_with_every_kind_of_reply", "reply"),
];

pub(crate) fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for source in [Source::Docker, Source::Native] {
        for (services, what, role) in TESTS {
            for &service in services {
                let name = format!("{}::{source}::{what}", service.name());
                tests.push(test(name, service, &[source], move || {
                    let temp = temp();
                    Role::new(service, role, temp.path()).forced(source).succeeds();
                }));
            }
        }
    }
    tests
}
