//! Waiting: time limits, order, release messages, and backoff.

use super::*;

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_wait_ends_when_its_time_is_up_and_no_sooner(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(kind, LONG).await, ground.lock(kind, LONG).await);
    let _held = here.take("sale").await;
    for lock in [here, there] {
        let began = Instant::now();
        let waited = lock.acquire("sale", &Owner::fresh(), ms(300)).await;
        let took = began.elapsed();
        assert!(matches!(waited, Err(LockError::NotAcquired(wait)) if wait == ms(300)));
        assert!(ms(300) <= took && took < ms(300) + PROMPTLY, "{took:?}");
    }
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_wait_of_zero_is_one_attempt(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(kind, LONG).await, ground.lock(kind, LONG).await);
    let _held = here.take("sale").await;
    let monitor = ground.monitor().await;
    let waited = there.acquire("sale", &Owner::fresh(), Duration::ZERO).await;
    assert!(matches!(waited, Err(LockError::NotAcquired(Duration::ZERO))));
    let calls = monitor.calls(&ground, &here.key("sale")).await;
    assert_eq!(calls.len(), 1, "{calls:#?}");
    assert_eq!(ground.listeners(&here.key("sale")).await, 0);
    // A lock that is free is taken.
    drop(there.acquire("free", &Owner::fresh(), Duration::ZERO).await.unwrap());
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_wait_may_be_without_end(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(kind, SHORT).await, ground.lock(kind, SHORT).await);
    let _held = here.take("sale").await;
    let waiter = there.waits("sale", Duration::MAX);
    assert!(waiter.await.unwrap().is_ok());
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn tasks_of_one_process_get_in_in_the_order_in_which_they_came(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, LONG).await;
    let held = lock.take("sale").await;
    let order = Arc::<Mutex<Vec<u32>>>::default();
    let waiters: Vec<_> = (0..20)
        .map(|number| {
            let (lock, order) = (lock.clone(), order.clone());
            // On one thread, tasks begin in the order in which they were spawned.
            tokio::spawn(async move {
                let guard = lock.acquire("sale", &Owner::fresh(), PATIENT).await.unwrap();
                order.lock().unwrap().push(number);
                guard.release().await.unwrap()
            })
        })
        .collect();
    eventually("they listen", async || ground.listeners(&lock.key("sale")).await > 0).await;
    assert_eq!(held.release().await.unwrap(), Released::Free);
    for waiter in waiters {
        assert_eq!(waiter.await.unwrap(), Released::Free);
    }
    assert_eq!(*order.lock().unwrap(), (0..20).collect::<Vec<_>>());
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_wait_goes_on_whatever_else_its_task_does(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(kind, LONG).await, ground.lock(kind, LONG).await);
    let held = here.take("sale").await;
    let owner = Owner::fresh();
    let mut waiting = Box::pin(there.acquire("sale", &owner, PATIENT));
    let mut ticks = tokio::time::interval(ms(2));
    for _ in 0..100 {
        tokio::select! {
            biased;
            _ = ticks.tick() => {}
            _ = &mut waiting => panic!("the lock is held"),
        }
    }
    assert_eq!(held.release().await.unwrap(), Released::Free);
    let freed = Instant::now();
    let next = waiting.await.unwrap();
    assert!(freed.elapsed() < PROMPTLY, "{:?}", freed.elapsed());
    assert_eq!(next.release().await.unwrap(), Released::Free);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_waiter_is_woken_by_the_release_and_does_not_poll(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(kind, LONG).await, ground.lock(kind, LONG).await);
    let held = here.take("sale").await;
    let monitor = ground.monitor().await;
    let waiter = there.waits("sale", PATIENT);
    let began = Instant::now();
    eventually("it waited for a while", async || began.elapsed() > ms(600)).await;
    // One look, one when it listens, one when it is sure that it does.
    let calls = monitor.calls(&ground, &here.key("sale")).await;
    assert!((2..=3).contains(&calls.len()), "{calls:#?}");
    let freed = Instant::now();
    assert_eq!(held.release().await.unwrap(), Released::Free);
    let (_next, at) = waiter.await.unwrap().unwrap();
    assert!(at - freed < PROMPTLY, "{:?}", at - freed);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_release_makes_one_waiter_of_each_process_try(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let key = ground.lock(kind, LONG).await.key("sale");
    let holder = ground.lock(kind, LONG).await;
    let held = holder.take("sale").await;
    let mut waiters = Vec::new();
    for _ in 0..3 {
        let lock = ground.lock(kind, LONG).await;
        waiters.extend((0..20).map(|_| lock.waits("sale", PATIENT)));
    }
    eventually("three processes listen", async || ground.listeners(&key).await == 3).await;
    let monitor = ground.monitor().await;
    let quiet = async || {
        let mut before = usize::MAX;
        eventually("nobody tries any more", async || {
            let now = monitor.calls(&ground, &key).await.len();
            std::mem::replace(&mut before, now) == now
        })
        .await;
        before
    };
    let before = quiet().await;
    assert_eq!(held.release().await.unwrap(), Released::Free);
    let in_now = async |waiters: &[JoinHandle<_>]| waiters.iter().filter(|waiter| waiter.is_finished()).count();
    eventually("one gets in", async || in_now(&waiters).await == 1).await;
    let began = Instant::now();
    eventually("it stays for a while", async || began.elapsed() > ms(200)).await;
    let calls = quiet().await - before;
    // The release, and once for each process.
    assert!((2..=4).contains(&calls), "{calls} calls");
    assert_eq!(in_now(&waiters).await, 1);
    for waiter in waiters {
        waiter.abort();
    }
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_lost_message_delays_a_waiter_to_the_end_of_the_lease_it_saw(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(kind, MIDDLING).await, ground.lock(kind, MIDDLING).await);
    let sent = Instant::now();
    let _held = here.take("sale").await;
    let waiter = there.waits("sale", PATIENT);
    eventually("the waiter listens", async || {
        ground.listeners(&here.key("sale")).await > 0
    })
    .await;
    // It is free, and nobody says so.
    assert_eq!(ground.ask::<i64>(&["DEL", &here.key("sale")]).await, 1);
    let (_next, at) = waiter.await.unwrap().unwrap();
    assert!(at - sent < MIDDLING.duration() + PROMPTLY, "{:?}", at - sent);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_waiter_whose_subscription_is_cut_looks_when_it_listens_again(#[case] kind: Kind) {
    let server = Redis::private().await.unwrap();
    let ground = Ground::on(&server).await;
    let (here, there) = (ground.lock(kind, LONG).await, ground.lock(kind, LONG).await);
    let held = here.take("sale").await;
    let waiter = there.waits("sale", PATIENT);
    eventually("the waiter listens", async || {
        ground.listeners(&here.key("sale")).await == 1
    })
    .await;
    // In one step: no message can reach it.
    let (cut, deleted): (i64, i64) = redis::pipe()
        .atomic()
        .cmd("CLIENT")
        .arg("KILL")
        .arg("TYPE")
        .arg("pubsub")
        .cmd("DEL")
        .arg(here.key("sale"))
        .query_async(&mut ground.raw.clone())
        .await
        .unwrap();
    assert_eq!((cut, deleted), (1, 1));
    let freed = Instant::now();
    let (_next, at) = waiter.await.unwrap().unwrap();
    assert!(at - freed < PROMPTLY, "{:?}", at - freed);
    assert_eq!(held.release().await.unwrap(), Released::NotOwner);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_connection_is_enough_for_many_names_and_waiters(#[case] kind: Kind) {
    let server = Redis::private().await.unwrap();
    let ground = Ground::on(&server).await;
    let lock = ground.lock(kind, LONG).await;
    let before: i64 = ground.ask::<String>(&["CLIENT", "LIST"]).await.lines().count() as i64;
    let tasks: Vec<_> = (0..32)
        .map(|task| {
            let lock = lock.clone();
            tokio::spawn(async move {
                for round in 0..10 {
                    let name = format!("sale {}", (task + round) % 5);
                    let guard = lock.acquire(&name, &Owner::fresh(), PATIENT).await.unwrap();
                    assert_eq!(guard.release().await.unwrap(), Released::Free);
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let after: i64 = ground.ask::<String>(&["CLIENT", "LIST"]).await.lines().count() as i64;
    assert!(after <= before + 1, "{after} connections, after {before}");
    eventually("nobody listens", async || {
        ground.ask::<Vec<String>>(&["PUBSUB", "CHANNELS"]).await.is_empty()
    })
    .await;
}

/// Such as one that another program left. Only who deletes it can free it.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_lock_without_an_end_does_not_make_its_waiters_poll(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, SHORT).await;
    let key = lock.key("sale");
    let _: i64 = ground.ask(&["HSET", &key, "somebody", "1"]).await;
    let monitor = ground.monitor().await;
    let waited = lock.acquire("sale", &Owner::fresh(), ms(900)).await;
    assert!(matches!(waited, Err(LockError::NotAcquired(_))));
    let calls = monitor.calls(&ground, &key).await;
    assert!(calls.len() <= 5, "{calls:#?}");
}

#[tokio::test]
async fn spin_pauses_longer_each_time_by_chance_and_listens_to_nobody() {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(Spin, LONG).await, ground.lock(Spin, LONG).await);
    let key = here.key("sale");
    let held = here.take("sale").await;
    let monitor = ground.monitor().await;
    let waiter = there.waits("sale", PATIENT);
    let began = Instant::now();
    eventually("it waited for a while", async || began.elapsed() > ms(600)).await;
    let calls = monitor.calls(&ground, &key).await.len();
    // At most 128 ms apart, half of it on average.
    assert!((3..60).contains(&calls), "{calls} attempts");
    assert_eq!(ground.listeners(&key).await, 0);
    let freed = Instant::now();
    assert_eq!(held.release().await.unwrap(), Released::Free);
    let (_next, at) = waiter.await.unwrap().unwrap();
    assert!(at - freed < PROMPTLY, "{:?}", at - freed);

    let longest: Vec<u128> = (1..=8)
        .map(|failures| Backoff::default().pause(failures, 1.0).as_millis())
        .collect();
    assert_eq!(longest, [1, 2, 4, 8, 16, 32, 64, 128]);
    assert_eq!(Backoff::default().pause(1_000, 0.5), ms(64));
    assert_eq!(Backoff::default().pause(3, 0.0), Duration::ZERO);
}

/// Nothing comes from Redis as long as nobody gives a lock back. So a connection that is dead has to be told from one that is quiet.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_subscription_that_went_silent_is_missed_and_made_anew(#[case] kind: Kind) {
    let server = Redis::private().await.unwrap();
    let direct = Ground::on(&server).await;
    let (ground, proxy) = behind_a_proxy(&server).await;
    let (here, there) = (direct.lock(kind, LONG).await, ground.lock(kind, LONG).await);
    let held = here.take("sale").await;
    let waiter = there.waits("sale", PATIENT);
    eventually("the waiter listens", async || {
        ground.listeners(&here.key("sale")).await == 1
    })
    .await;
    proxy.cuts(Cut::Silence("SUBSCRIBE"));
    eventually("it went silent", async || proxy.connections_silenced() == 1).await;
    assert_eq!(held.release().await.unwrap(), Released::Free);
    proxy.cuts(Cut::Nothing);
    // It would be at the end of the lease that it saw, and its patience ends before that.
    let (_next, _at) = waiter.await.unwrap().unwrap();
    assert!(proxy.said_in_vain() > 0, "nobody asked whether the connection is one");
}

/// The next one here asks right behind the release. Were that always so, others would wait for as long as anybody queues here.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_process_whose_queue_never_ends_lets_others_in(#[case] kind: Kind) {
    /// Each time somebody elsewhere has a chance, and no certainty.
    const CHANCES: u32 = 10;

    let server = Redis::private().await.unwrap();
    let direct = Ground::on(&server).await;
    let (ground, proxy) = behind_a_proxy(&server).await;
    let (crowd, elsewhere) = (ground.lock(kind, LONG).await, direct.lock(kind, LONG).await);
    // On a network, beside whatever else a process asks of Redis, a release and the question behind it get there together.
    proxy.cuts(Cut::Slow(ms(1)));
    let others: Vec<_> = (0..4)
        .map(|_| {
            let redis = crowd.connections().clone();
            tokio::spawn(async move { while redis.send::<String>(redis::cmd("PING")).await.is_ok() {} })
        })
        .collect();
    let turns = Arc::<AtomicU32>::default();
    let queueing: Vec<_> = (0..8)
        .map(|_| {
            let (lock, turns) = (crowd.clone(), turns.clone());
            tokio::spawn(async move {
                loop {
                    let held = lock.acquire("sale", &Owner::fresh(), PATIENT).await.unwrap();
                    turns.fetch_add(1, Relaxed);
                    assert_eq!(held.release().await.unwrap(), Released::Free);
                }
            })
        })
        .collect();
    eventually("they queue", async || turns.load(Relaxed) > 20).await;
    let before = turns.load(Relaxed);
    let waiter = elsewhere.waits("sale", PATIENT);
    let most = CHANCES * MAX_LOCAL_HANDOFFS;
    eventually("it is in, or had its chances", async || {
        waiter.is_finished() || turns.load(Relaxed) - before > most
    })
    .await;
    let passed = turns.load(Relaxed) - before;
    for task in queueing.into_iter().chain(others) {
        task.abort();
    }
    assert!(passed <= most, "{passed} were let in before it");
    println!("{passed} were let in before it");
    let (held, _) = waiter.await.unwrap().unwrap();
    assert_eq!(held.release().await.unwrap(), Released::Free);
}
