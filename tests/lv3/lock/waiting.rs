//! Waiting: time limits, order, release messages, and backoff.

use super::*;

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_wait_ends_with_its_time_out_and_no_sooner(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let (here, there) = (env.lock(kind, LONG).await, env.lock(kind, LONG).await);
    let _held = here.take("sale").await;
    for lock in [here, there] {
        let began = Instant::now();
        let waited = lock.acquire("sale", &Owner::fresh(), ms(300)).await;
        let took = began.elapsed();
        assert!(matches!(waited, Err(LockError::NotAcquired(wait)) if wait == ms(300)));
        assert!(ms(300) <= took && took < ms(300) + AT_ONCE, "{took:?}");
    }
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_wait_of_zero_is_one_attempt(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let (here, there) = (env.lock(kind, LONG).await, env.lock(kind, LONG).await);
    let _held = here.take("sale").await;
    let monitor = env.monitor().await;
    let waited = there.acquire("sale", &Owner::fresh(), Duration::ZERO).await;
    assert!(matches!(waited, Err(LockError::NotAcquired(Duration::ZERO))));
    let calls = monitor.calls(&env, &here.key("sale")).await;
    assert_eq!(calls.len(), 1, "{calls:#?}");
    assert_eq!(env.listeners(&here.key("sale")).await, 0);
    // A free lock is acquired.
    drop(there.acquire("free", &Owner::fresh(), Duration::ZERO).await.unwrap());
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_wait_may_be_unbounded(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let (here, there) = (env.lock(kind, SHORT).await, env.lock(kind, SHORT).await);
    let _held = here.take("sale").await;
    let waiter = there.spawn_waiter("sale", Duration::MAX);
    let acquired = tokio::time::timeout(LONG_WAIT, waiter).await;
    assert!(acquired.expect("the lease ends the wait").unwrap().is_ok());
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn tasks_of_one_process_acquire_the_lock_in_order_of_arrival(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let lock = env.lock(kind, LONG).await;
    let held = lock.take("sale").await;
    let order = Arc::<Mutex<Vec<u32>>>::default();
    let waiters: Vec<_> = (0..20)
        .map(|number| {
            let (lock, order) = (lock.clone(), order.clone());
            // On one thread, tasks start in the order in which they were spawned.
            tokio::spawn(async move {
                let guard = lock.acquire("sale", &Owner::fresh(), LONG_WAIT).await.unwrap();
                order.lock().unwrap().push(number);
                guard.release().await.unwrap()
            })
        })
        .collect();
    eventually("they listen", async || env.listeners(&lock.key("sale")).await > 0).await;
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
async fn a_wait_continues_whatever_else_its_task_does(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let (here, there) = (env.lock(kind, LONG).await, env.lock(kind, LONG).await);
    let held = here.take("sale").await;
    let owner = Owner::fresh();
    let mut waiting = Box::pin(there.acquire("sale", &owner, LONG_WAIT));
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
    assert!(freed.elapsed() < AT_ONCE, "{:?}", freed.elapsed());
    assert_eq!(next.release().await.unwrap(), Released::Free);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_waiter_is_woken_by_the_release_and_does_not_poll(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let (here, there) = (env.lock(kind, LONG).await, env.lock(kind, LONG).await);
    let held = here.take("sale").await;
    let monitor = env.monitor().await;
    let waiter = there.spawn_waiter("sale", LONG_WAIT);
    let began = Instant::now();
    eventually("it waited for a while", async || began.elapsed() > ms(600)).await;
    // One attempt, one after it asks for the subscription, one after Redis confirms it.
    let calls = monitor.calls(&env, &here.key("sale")).await;
    assert!((2..=3).contains(&calls.len()), "{calls:#?}");
    let freed = Instant::now();
    assert_eq!(held.release().await.unwrap(), Released::Free);
    let (_next, at) = waiter.await.unwrap().unwrap();
    assert!(at - freed < AT_ONCE, "{:?}", at - freed);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_release_makes_one_waiter_of_each_process_try(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let holder = env.lock(kind, LONG).await;
    let key = holder.key("sale");
    // A script that Redis does not know yet takes one call more.
    assert_eq!(holder.take("other").await.release().await.unwrap(), Released::Free);
    let held = holder.take("sale").await;
    let mut waiters = Vec::new();
    for _ in 0..3 {
        let lock = env.lock(kind, LONG).await;
        waiters.extend((0..20).map(|_| lock.spawn_waiter("sale", LONG_WAIT)));
    }
    eventually("three processes listen", async || env.listeners(&key).await == 3).await;
    let monitor = env.monitor().await;
    let quiet = async || {
        let mut before = usize::MAX;
        eventually("there are no more attempts", async || {
            let now = monitor.calls(&env, &key).await.len();
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
    // The release, and one attempt of each process.
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
    let env = LockEnvironment::shared().await;
    let (here, there) = (env.lock(kind, MEDIUM).await, env.lock(kind, MEDIUM).await);
    let sent = Instant::now();
    let _held = here.take("sale").await;
    let waiter = there.spawn_waiter("sale", LONG_WAIT);
    eventually("the waiter listens", async || {
        env.listeners(&here.key("sale")).await > 0
    })
    .await;
    // The lock is freed without a message.
    assert_eq!(env.command::<i64>(&["DEL", &here.key("sale")]).await, 1);
    let (_next, at) = waiter.await.unwrap().unwrap();
    assert!(at - sent < MEDIUM.duration() + AT_ONCE, "{:?}", at - sent);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_waiter_whose_subscription_is_cut_tries_again_after_the_reconnect(#[case] kind: Kind) {
    let server = Redis::private().await.unwrap();
    let env = LockEnvironment::on(&server).await;
    let (here, there) = (env.lock(kind, LONG).await, env.lock(kind, LONG).await);
    let held = here.take("sale").await;
    let waiter = there.spawn_waiter("sale", LONG_WAIT);
    eventually("the waiter listens", async || {
        env.listeners(&here.key("sale")).await == 1
    })
    .await;
    // Atomically: no message can reach the waiter.
    let (cut, deleted): (i64, i64) = redis::pipe()
        .atomic()
        .cmd("CLIENT")
        .arg("KILL")
        .arg("TYPE")
        .arg("pubsub")
        .cmd("DEL")
        .arg(here.key("sale"))
        .query_async(&mut env.raw.clone())
        .await
        .unwrap();
    assert_eq!((cut, deleted), (1, 1));
    let freed = Instant::now();
    let (_next, at) = waiter.await.unwrap().unwrap();
    assert!(at - freed < AT_ONCE, "{:?}", at - freed);
    assert_eq!(held.release().await.unwrap(), Released::NotOwner);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_connection_is_enough_for_many_names_and_waiters(#[case] kind: Kind) {
    let server = Redis::private().await.unwrap();
    let env = LockEnvironment::on(&server).await;
    let lock = env.lock(kind, LONG).await;
    let before: i64 = env.command::<String>(&["CLIENT", "LIST"]).await.lines().count() as i64;
    let tasks: Vec<_> = (0..32)
        .map(|task| {
            let lock = lock.clone();
            tokio::spawn(async move {
                for round in 0..10 {
                    let name = format!("sale {}", (task + round) % 5);
                    let guard = lock.acquire(&name, &Owner::fresh(), LONG_WAIT).await.unwrap();
                    assert_eq!(guard.release().await.unwrap(), Released::Free);
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let after: i64 = env.command::<String>(&["CLIENT", "LIST"]).await.lines().count() as i64;
    assert!(after <= before + 1, "{after} connections, after {before}");
    eventually("there are no subscribers", async || {
        env.command::<Vec<String>>(&["PUBSUB", "CHANNELS"]).await.is_empty()
    })
    .await;
}

/// A key left by another program: only its deletion frees the lock.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_lock_without_a_ttl_does_not_make_its_waiters_poll(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let lock = env.lock(kind, SHORT).await;
    let key = lock.key("sale");
    let _: i64 = env.command(&["HSET", &key, "other", "1"]).await;
    let monitor = env.monitor().await;
    let waited = lock.acquire("sale", &Owner::fresh(), ms(900)).await;
    assert!(matches!(waited, Err(LockError::NotAcquired(_))));
    let calls = monitor.calls(&env, &key).await;
    assert!(calls.len() <= 5, "{calls:#?}");
}

#[tokio::test]
async fn spin_backs_off_with_jitter_and_subscribes_to_nothing() {
    let env = LockEnvironment::shared().await;
    let (here, there) = (env.lock(Spin, LONG).await, env.lock(Spin, LONG).await);
    let key = here.key("sale");
    let held = here.take("sale").await;
    let monitor = env.monitor().await;
    let waiter = there.spawn_waiter("sale", LONG_WAIT);
    let began = Instant::now();
    eventually("it waited for a while", async || began.elapsed() > ms(600)).await;
    let calls = monitor.calls(&env, &key).await.len();
    // The pause is at most 128 ms, and half of that on average.
    assert!((3..60).contains(&calls), "{calls} attempts");
    assert_eq!(env.listeners(&key).await, 0);
    let freed = Instant::now();
    assert_eq!(held.release().await.unwrap(), Released::Free);
    let (_next, at) = waiter.await.unwrap().unwrap();
    assert!(at - freed < AT_ONCE, "{:?}", at - freed);

    let longest: Vec<u128> = (1..=8)
        .map(|failures| Backoff::default().pause(failures, 1.0).as_millis())
        .collect();
    assert_eq!(longest, [1, 2, 4, 8, 16, 32, 64, 128]);
    assert_eq!(Backoff::default().pause(1_000, 0.5), ms(64));
    assert_eq!(Backoff::default().pause(3, 0.0), Duration::ZERO);
}

/// No message arrives while no lock is released, so a dead connection has to be told from a quiet
/// one.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_dead_subscription_is_detected_and_replaced(#[case] kind: Kind) {
    let server = Redis::private().await.unwrap();
    let direct = LockEnvironment::on(&server).await;
    let (env, proxy) = behind_a_proxy(&server).await;
    let (here, there) = (direct.lock(kind, LONG).await, env.lock(kind, LONG).await);
    let held = here.take("sale").await;
    let waiter = there.spawn_waiter("sale", LONG_WAIT);
    eventually("the waiter listens", async || {
        env.listeners(&here.key("sale")).await == 1
    })
    .await;
    proxy.inject(Fault::Blackhole("SUBSCRIBE"));
    eventually("it went silent", async || proxy.connections_blackholed() == 1).await;
    assert_eq!(held.release().await.unwrap(), Released::Free);
    proxy.inject(Fault::None);
    // Without a reconnect it would wait for the end of the lease, which is longer than its time
    // limit.
    let (_next, _at) = waiter.await.unwrap().unwrap();
    assert!(proxy.chunks_discarded() > 0, "the connection was never pinged");
}

/// The next local task asks right behind the release. Without a bound, an endless local queue would
/// starve other processes.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_process_with_an_endless_queue_does_not_starve_others(#[case] kind: Kind) {
    /// Each pause is a chance for another process, not a certainty.
    const CHANCES: u32 = 10;

    let server = Redis::private().await.unwrap();
    let direct = LockEnvironment::on(&server).await;
    let (env, proxy) = behind_a_proxy(&server).await;
    let (local, elsewhere) = (env.lock(kind, LONG).await, direct.lock(kind, LONG).await);
    // On a network with other traffic, a release and the command behind it arrive together.
    proxy.inject(Fault::Delay(ms(1)));
    let others: Vec<_> = (0..4)
        .map(|_| {
            let redis = local.connections().clone();
            tokio::spawn(async move { while redis.send::<String>(redis::cmd("PING")).await.is_ok() {} })
        })
        .collect();
    let turns = Arc::<AtomicU32>::default();
    let queueing: Vec<_> = (0..8)
        .map(|_| {
            let (lock, turns) = (local.clone(), turns.clone());
            tokio::spawn(async move {
                loop {
                    let held = lock.acquire("sale", &Owner::fresh(), LONG_WAIT).await.unwrap();
                    turns.fetch_add(1, Relaxed);
                    assert_eq!(held.release().await.unwrap(), Released::Free);
                }
            })
        })
        .collect();
    eventually("they queue", async || turns.load(Relaxed) > 20).await;
    let before = turns.load(Relaxed);
    let waiter = elsewhere.spawn_waiter("sale", LONG_WAIT);
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
