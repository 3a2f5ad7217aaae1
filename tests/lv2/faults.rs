//! Faults: a database that is down, failed commits, a locked row, killed and restarted servers.

use super::{schedules::lock_row, *};

#[tokio::test]
async fn without_its_database_all_waiters_for_the_mutex_end_as_indeterminate_in_time() {
    /// The mutex's time limit, and then the pool's for the last one that gets the mutex.
    const IN_TIME: Duration = Duration::from_secs(5 + 5);
    /// The allowance for 50 answers beyond those waits.
    const BESIDES: Duration = Duration::from_secs(5);

    let postgres = Postgres::private(Durability::Fast).await.unwrap();
    let environment = TestEnvironment::on(&postgres, None, BARE).await.unwrap();
    let server = TestServer::start(&environment, &program(), &LEVEL, strategy("mutex"))
        .await
        .unwrap();
    server.create_rush_sale(1).await.unwrap();

    postgres.stop().await.unwrap();
    let requests: JoinSet<_> = (1..=50).map(|buyer| status_of(server.address(), buyer)).collect();
    let answers = timeout(IN_TIME + BESIDES, requests.join_all())
        .await
        .expect("a request still waits for the mutex");
    for answer in answers {
        assert_eq!(answer.unwrap(), "503");
    }

    postgres.start().await.unwrap();
    assert_eq!(server.reserve(SALE, 1, Some("again")).await.unwrap().status, 201);
    server.stop().await.unwrap();
}

/// No bytes pass on the idle connections of the pool any more, and nobody closes them. Postgres
/// answers new connections.
#[rstest]
#[case::mutex("mutex")]
#[case::pessimistic("pessimistic")]
#[case::optimistic("optimistic")]
#[case::conditional_update("conditional-update")]
#[tokio::test]
async fn buyers_are_served_although_all_idle_connections_fell_silent(#[case] name: &str) {
    let strategy = strategy(name);
    let environment = TestEnvironment::shared(strategy).await.unwrap();
    let postgres = backends::postgres().await.unwrap();
    let proxy = Proxy::before(postgres.report().address.clone()).await.unwrap();
    let behind = program()
        .variable("DATABASE_URL", proxy.url_through(&environment.database().url()))
        .variable("WORK_MS", "50");
    let server = TestServer::start(&environment, &behind, &LEVEL, strategy)
        .await
        .unwrap();
    server.create_rush_sale(100).await.unwrap();
    let history = HistoryRecorder::new(strategy);
    let four_buyers = async |first: i64| {
        let answers = tokio::join!(
            history.reserve(&server, first),
            history.reserve(&server, first + 1),
            history.reserve(&server, first + 2),
            history.reserve(&server, first + 3),
        );
        for answer in <[Answer; 4]>::from(answers) {
            assert!(matches!(answer, Answer::Confirmed { .. }), "{answer:?}");
        }
    };
    four_buyers(1).await;

    history.record_fault("all open connections fall silent");
    assert!(proxy.silence_open_connections().await > 0, "the fault did not strike");
    let observer = environment.database().pool(1).await.unwrap();
    until(
        "the connections have been idle for long enough to be pinged",
        async || {
            sqlx::query_scalar(
                "select bool_and(clock_timestamp() - state_change > interval '200 milliseconds')
               from pg_stat_activity
              where datname = current_database()
                and pid <> pg_backend_pid()",
            )
            .fetch_one(&observer)
            .await
            .unwrap()
        },
    )
    .await;
    four_buyers(5).await;
    assert!(
        proxy.chunks_discarded() > 0,
        "the fault did not strike: no silent connection was tried"
    );
    history.record_recovery();
    server.stop().await.unwrap();
    assert_after_fault(strategy, &history.verdict(&environment).await.unwrap(), &[]);
}

/// Postgres rejects a commit at the last moment. The buyer must not be told that it succeeded, and
/// gets the ticket on a retry.
#[rstest]
#[case::mutex("mutex")]
#[case::pessimistic("pessimistic")]
#[case::optimistic("optimistic")]
#[case::conditional_update("conditional-update")]
#[tokio::test]
async fn a_failed_commit_confirms_no_reservation(#[case] name: &str) {
    let strategy = strategy(name);
    let environment = TestEnvironment::shared(strategy).await.unwrap();
    let server = TestServer::start(&environment, &program(), &LEVEL, strategy)
        .await
        .unwrap();
    server.create_rush_sale(1).await.unwrap();
    let held = DelayedCommits::on(&environment).await.unwrap();
    let history = HistoryRecorder::new(strategy);

    let (ann, ()) = tokio::join!(history.reserve(&server, 1), async {
        until("the fault did not strike: no commit is in flight", async || {
            held.has_struck().await.unwrap()
        })
        .await;
        history.record_fault("a failed commit");
        assert_eq!(held.fail().await.unwrap(), 1, "the fault did not strike");
        held.release().await.unwrap();
        history.record_recovery();
    });
    assert_eq!(ann, Answer::Indeterminate);
    assert!(matches!(history.reserve(&server, 1).await, Answer::Confirmed { .. }));
    assert_eq!(history.reserve(&server, 2).await, Answer::Refused(Refused::SoldOut));
    server.stop().await.unwrap();
    assert_after_fault(strategy, &history.verdict(&environment).await.unwrap(), &[]);
}

/// The connection breaks with Ann's commit in flight, and her request releases the mutex. Bob reads
/// the state before it, and Postgres carries out both commits.
#[tokio::test]
async fn a_mutex_does_not_cover_a_commit_that_lost_its_connection() {
    let strategy = strategy("mutex");
    let environment = TestEnvironment::shared(strategy).await.unwrap();
    let postgres = backends::postgres().await.unwrap();
    let proxy = Proxy::before(postgres.report().address.clone()).await.unwrap();
    let behind = program().variable("DATABASE_URL", proxy.url_through(&environment.database().url()));
    let server = TestServer::start(&environment, &behind, &LEVEL, strategy)
        .await
        .unwrap();
    server.create_rush_sale(1).await.unwrap();
    let held = DelayedCommits::on(&environment).await.unwrap();
    let history = HistoryRecorder::new(strategy);

    let (ann, ()) = tokio::join!(history.reserve(&server, 1), async {
        until("the fault did not strike: no commit is in flight", async || {
            held.has_struck().await.unwrap()
        })
        .await;
        proxy.inject(Fault::CloseAll);
        until("the fault did not strike: no connection passed the proxy", async || {
            proxy.has_struck()
        })
        .await;
        history.record_fault("a commit has lost its connection");
    });
    assert_eq!(ann, Answer::Indeterminate);
    proxy.inject(Fault::None);
    history.record_recovery();
    let bob = async {
        // He retries, as he may get a pooled connection that was cut as well.
        loop {
            match history.reserve(&server, 2).await {
                Answer::Indeterminate => {}
                answer => break answer,
            }
        }
    };
    let (bob, ()) = tokio::join!(bob, async {
        until("Bob waits for the row", async || {
            held.waiting("transactionid tuple").await.unwrap() > 0
        })
        .await;
        held.release().await.unwrap();
    });
    assert!(matches!(bob, Answer::Confirmed { .. }), "{bob:?}");
    assert!(matches!(history.reserve(&server, 1).await, Answer::Confirmed { .. }));
    server.stop().await.unwrap();
    assert_after_fault(
        strategy,
        &history.verdict(&environment).await.unwrap(),
        &[NoOversell, Conservation],
    );
}

/// "Sold out" is a statement about the sale: a request that could not read the sale must not answer
/// it.
#[rstest]
#[case::mutex("mutex")]
#[case::pessimistic("pessimistic")]
#[case::optimistic("optimistic")]
#[case::conditional_update("conditional-update")]
#[tokio::test]
async fn a_row_locked_for_too_long_leaves_the_outcome_indeterminate(#[case] name: &str) {
    let strategy = strategy(name);
    let environment = TestEnvironment::shared(strategy).await.unwrap();
    let server = TestServer::start(&environment, &program(), &LEVEL, strategy)
        .await
        .unwrap();
    server.create_rush_sale(1).await.unwrap();
    let observer = environment.database().pool(1).await.unwrap();
    let other = lock_row(&observer, SALE).await;

    server
        .reserve(SALE, 1, Some("a"))
        .await
        .unwrap()
        .is(ProblemKind::Overloaded)
        .unwrap();
    other.rollback().await.unwrap();
    let again = server.reserve(SALE, 1, Some("a")).await.unwrap();
    server.expect_confirmed(&again).await.unwrap();
    server.stop().await.unwrap();
}

/// Requests a ticket without a client time-out. Returns the status code.
async fn status_of(address: SocketAddr, buyer: i64) -> std::io::Result<String> {
    let body = format!("{{\"buyer_id\": {buyer}}}");
    let request = format!(
        "POST /api/sales/{SALE}/reservations HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(request.as_bytes()).await?;
    let mut start = [0; 12]; // HTTP/1.1 503
    stream.read_exact(&mut start).await?;
    Ok(String::from_utf8_lossy(&start[9..]).into_owned())
}

#[tokio::test]
async fn an_instance_killed_in_mid_rush_leaves_only_what_was_in_flight_on_it_undecided() {
    let strategy = strategy("pessimistic");
    instance_faults::a_kill_leaves_only_what_was_in_flight_undecided(&program(), &LEVEL, strategy, &Invariant::ALL)
        .await;
}

#[tokio::test]
async fn a_rolling_restart_leaves_nobody_undecided() {
    let strategy = strategy("pessimistic");
    instance_faults::a_rolling_restart_leaves_nobody_undecided(&program(), &LEVEL, strategy, &Invariant::ALL).await;
}

#[tokio::test]
#[should_panic(expected = "a request has an unknown outcome: an instance exited before it had answered")]
async fn a_rolling_restart_of_servers_that_do_not_drain_is_noticed() {
    let program = instance_faults::without_drain(env!("CARGO_BIN_EXE_lv2-db-lock"));
    let strategy = strategy("pessimistic");
    instance_faults::a_rolling_restart_leaves_nobody_undecided(&program, &LEVEL, strategy, &Invariant::ALL).await;
}

#[tokio::test]
#[should_panic(expected = "did not strike")]
async fn a_rush_in_which_nobody_is_killed_says_nothing_of_kills() {
    instance_faults::nobody_is_killed(&program(), &LEVEL, strategy("pessimistic")).await;
}

#[tokio::test]
#[should_panic(expected = "did not strike")]
async fn a_rush_in_which_nobody_is_replaced_says_nothing_of_restarts() {
    instance_faults::nobody_is_replaced(&program(), &LEVEL, strategy("pessimistic")).await;
}

/// The server is connected to a replica: after a failover its address may still point to the old
/// primary. A replica answers every read.
#[rstest]
#[case::pessimistic("pessimistic")]
#[case::conditional_update("conditional-update")]
#[tokio::test]
async fn a_replica_is_not_ready_until_it_is_promoted(#[case] name: &str) {
    let strategy = strategy(name);
    let postgres = Postgres::private(Durability::Fast).await.unwrap();
    let environment = TestEnvironment::on(&postgres, None, strategy.schema).await.unwrap();
    let server = TestServer::start(&environment, &program(), &LEVEL, strategy)
        .await
        .unwrap();
    server.create_rush_sale(1).await.unwrap();
    let pid = server.pid().await.unwrap();
    let admin = environment.database().pool(1).await.unwrap();
    let run = async |statement: &'static str| sqlx::raw_sql(statement).execute(&admin).await.unwrap();

    // A program that Postgres runs is started in the data directory.
    run("copy (select '') to program 'cat > standby.signal'").await;
    postgres.stop().await.unwrap();
    postgres.start().await.unwrap();
    let replica: bool = sqlx::query_scalar("select pg_is_in_recovery()")
        .fetch_one(&admin)
        .await
        .unwrap();
    assert!(replica, "the fault did not strike");

    until("the server names the reason", async || {
        let answer = server.get("/readyz").await.unwrap();
        String::from_utf8_lossy(&answer.body).contains("read-only transaction")
    })
    .await;
    assert_eq!(server.get("/readyz").await.unwrap().status, 503);
    assert_eq!(server.reserve(SALE, 1, Some("a")).await.unwrap().status, 503);

    run("select pg_promote()").await;
    until("the server is ready again", async || {
        server.get("/readyz").await.unwrap().status == 200
    })
    .await;
    assert_eq!(server.reserve(SALE, 1, Some("a")).await.unwrap().status, 201);
    assert_eq!(server.pid().await.unwrap(), pid, "it is another process");
    server.stop().await.unwrap();
}
