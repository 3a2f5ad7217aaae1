//! Tests of the backends: the choice of a source, the messages when a service is missing, the
//! servers themselves, and their cleanup.
//!
//! Settings come from the environment, and a process can end only once. Most tests therefore run
//! this program again as a child, with its own settings and temporary folder, in the role that
//! [`child::ROLE`] names and on the service that [`child::SERVICE`] names.
#![allow(clippy::unwrap_used)]

mod child;
mod child_roles;
mod external;
mod fake_docker_engine;
mod kafka;
mod managed_servers;
mod postgres;
mod reaper;
mod redis;
mod service;
mod setup_script;
mod sources;

use std::{env, path::Path};

use harness::backends::Source;
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::{
    child::ROLE,
    service::{Service, absent},
};

fn main() {
    if let Ok(role) = env::var(ROLE) {
        return child_roles::play(&role);
    }
    let required = match required() {
        Ok(required) => required,
        Err(message) => {
            eprintln!("{message}");
            std::process::exit(2);
        }
    };
    let tests = tests().into_iter().map(|test| {
        let required = required.clone();
        Trial::ignorable_test(test.name.clone(), move || {
            let absent = test
                .needs
                .iter()
                .find_map(|&source| Some((source, absent(test.service, source)?)));
            match absent {
                Some((source, reason)) if required.contains(&source) => {
                    Err(Failed::from(format!("OVERSOLD_REQUIRE lists {source}, but: {reason}")))
                }
                Some((source, reason)) => Ok(Completion::ignored_with(format!("no {source} source: {reason}"))),
                None => {
                    (test.run)();
                    Ok(Completion::Completed)
                }
            }
        })
    });
    let mut arguments = Arguments::from_args();
    // The tests mostly wait for servers to start and to stop.
    arguments.test_threads.get_or_insert(4);
    libtest_mimic::run(&arguments, tests.collect()).exit();
}

/// The sources that must be available, from `OVERSOLD_REQUIRE`.
fn required() -> Result<Vec<Source>, String> {
    let listed = env::var("OVERSOLD_REQUIRE").unwrap_or_default();
    let names = listed.split(',').map(str::trim).filter(|name| !name.is_empty());
    names
        .map(|name| {
            let mut known = [Source::Docker, Source::Native].into_iter();
            known.find(|source| source.name() == name).ok_or_else(|| {
                format!("OVERSOLD_REQUIRE lists `{name}`; expected `docker` and `native`, with a comma between them")
            })
        })
        .collect()
}

pub(crate) struct Test {
    pub(crate) name: String,
    pub(crate) service: Service,
    pub(crate) needs: Vec<Source>,
    pub(crate) run: Box<dyn FnOnce() + Send>,
}

pub(crate) fn test(
    name: impl Into<String>,
    service: Service,
    needs: &[Source],
    run: impl FnOnce() + Send + 'static,
) -> Test {
    Test {
        name: name.into(),
        service,
        needs: needs.to_vec(),
        run: Box::new(run),
    }
}

/// Creates the same test for each service.
pub(crate) fn of_each(name: &str, needs: &[Source], run: fn(Service)) -> Vec<Test> {
    let of = |service: Service| {
        test(format!("{}::{name}", service.name()), service, needs, move || {
            run(service)
        })
    };
    Service::ALL.map(of).into()
}

/// Creates a test of one service.
pub(crate) fn of_one(name: &str, service: Service, needs: &[Source], run: fn()) -> Test {
    test(name, service, needs, run)
}

fn tests() -> Vec<Test> {
    [
        sources::tests(),
        fake_docker_engine::tests(),
        external::tests(),
        managed_servers::tests(),
        kafka::tests(),
        reaper::tests(),
        setup_script::tests(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

pub(crate) fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap()
}
