//! LV.2: the contract that LV.1 breaks, and the limits of each strategy that keeps it.

#![allow(clippy::unwrap_used)]

mod cancellation;
mod contract;
mod faults;
mod http;
mod isolation;
mod mutants;
mod pool;
mod retries;
mod schedules;

use std::{collections::HashSet, net::SocketAddr, time::Duration};

use box_office::{
    Invariant::{self, Conservation, NoDuplicate, NoOversell, NoUndersell, OneAnswer, Progress},
    ProblemKind, Promises, SaleId, Strategy,
};

use harness::{
    DelayedCommits, assert_after_fault, assert_declared, assert_failure_mode,
    backends::{self, Database, Durability, Postgres, TestEnvironment},
    contract,
    history::{Answer, Refused, Request},
    history_recorder::HistoryRecorder,
    judge::{Conclusion, judge},
    proxy::{Fault, Proxy},
    required,
    rush::{Program, Report, Rush, SALE},
    schedule::{
        Exploration, Scenario, ScheduleRunner, cancelled_after_every_poll, disconnected_at_every_point,
        never_cancelled, never_disconnected,
    },
    shared_tests::{http_contract, instance_faults, slow_clients},
    test_server::TestServer,
    until,
};

use lv2_db_lock::{BARE, LEVEL};
use rstest::rstest;
use sqlx::{PgPool, postgres::PgTransaction};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::oneshot,
    task::JoinSet,
    time::{sleep, timeout},
};

fn program() -> Program {
    Program::new(env!("CARGO_BIN_EXE_lv2-db-lock"))
}

fn strategy(name: &str) -> &'static Strategy {
    LEVEL
        .strategy(name)
        .unwrap_or_else(|| panic!("LV.2 has no strategy {name}"))
}

const KEEPS: Promises = Promises::ALL_KEPT;

const OVERSELLS: Promises = Promises::ALL_KEPT
    .breaks(&[NoOversell, Conservation])
    .leaves_open(&[NoDuplicate, OneAnswer]);
const DUPLICATES: Promises = Promises::ALL_KEPT.breaks(&[NoDuplicate]).leaves_open(&[OneAnswer]);

const STARVES: Promises = Promises::ALL_KEPT.breaks(&[Progress]).leaves_open(&[NoUndersell]);
