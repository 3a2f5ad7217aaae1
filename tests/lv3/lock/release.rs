//! Release: by the owner, after the lease, by force, and by a dropped guard.

use super::*;

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_release_after_the_lease_reports_it_and_leaves_the_next_holder_alone(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let (here, there) = (env.lock(kind, SHORT).await, env.lock(kind, LONG).await);
    let late = here.take("sale").await;
    let (successor, _) = there.spawn_waiter("sale", LONG_WAIT).await.unwrap().unwrap();
    let left = env.pttl(&here.key("sale")).await;
    assert_eq!(late.release().await.unwrap(), Released::NotOwner);
    let after = env.pttl(&here.key("sale")).await;
    assert!(0 < after && after <= left, "{after} ms left, after {left}");
    assert!(here.rejects_others("sale").await && !successor.is_lost());
    assert_eq!(successor.release().await.unwrap(), Released::Free);
}

#[rstest]
#[case::rlock(Rlock, 0)]
#[case::fenced(Fenced, 1)]
#[case::spin(Spin, 0)]
#[tokio::test]
async fn after_the_last_release_nothing_is_left_but_the_last_token(#[case] kind: Kind, #[case] keys: i64) {
    let server = Redis::private().await.unwrap();
    let env = LockEnvironment::on(&server).await;
    let (here, there) = (env.lock(kind, LONG).await, env.lock(kind, LONG).await);
    for _ in 0..30 {
        let held = here.take("sale").await;
        let waiting = [&here, &there, &there].map(|lock| async {
            let next = lock.acquire("sale", &Owner::fresh(), LONG_WAIT).await.unwrap();
            assert_eq!(next.release().await.unwrap(), Released::Free);
        });
        let releasing = async { assert_eq!(held.release().await.unwrap(), Released::Free) };
        tokio::join!(releasing, futures_util::future::join_all(waiting));
    }
    eventually("there are no subscribers", async || {
        env.command::<Vec<String>>(&["PUBSUB", "CHANNELS"]).await.is_empty()
    })
    .await;
    let left: Vec<String> = env.command(&["KEYS", "*"]).await;
    assert_eq!(env.command::<i64>(&["DBSIZE"]).await, keys, "{left:?}");
    // What is left expires: names are invented by callers.
    for key in left {
        let left = env.pttl(&key).await;
        assert!(0 < left && left <= 86_400_000, "{key}: {left} ms");
    }
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_forced_release_frees_the_lock_and_its_holder_is_notified(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let holder = env.lock(kind, RENEWED).await;
    let (elsewhere, third) = (env.lock(kind, LONG).await, env.lock(kind, LONG).await);
    let owner = Owner::fresh();
    let first = holder.acquire("sale", &owner, LONG_WAIT).await.unwrap();
    let second = holder.acquire("sale", &owner, LONG_WAIT).await.unwrap();
    let waiter = elsewhere.spawn_waiter("sale", LONG_WAIT);
    eventually("the waiter listens", async || {
        env.listeners(&holder.key("sale")).await > 0
    })
    .await;

    let forced = Instant::now();
    assert!(third.reentrant().force_release("sale").await.unwrap());
    let (next, at) = waiter.await.unwrap().unwrap();
    assert!(at - forced < AT_ONCE, "{:?}", at - forced);
    // At its next renewal.
    lost(&first).await;
    assert!(first.is_lost() && second.is_lost());
    let monitor = env.monitor().await;
    assert_eq!(first.release().await.unwrap(), Released::NotOwner);
    assert_eq!(second.release().await.unwrap(), Released::NotOwner);
    assert!(!next.is_lost() && third.rejects_others("sale").await);
    let began = Instant::now();
    eventually("a lease is over", async || began.elapsed() > PAST_RENEWED_LEASE).await;
    let mut renewals = monitor.about(&env, "\"pexpire\"").await;
    renewals.retain(|line| line.contains(&holder.key("sale")));
    assert_eq!(renewals, [""; 0]);
    assert_eq!(next.release().await.unwrap(), Released::Free);
    assert!(!third.reentrant().force_release("sale").await.unwrap());
}

/// Waiters in the holder's process are queued behind the holder.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_forced_release_in_the_holders_process_lets_its_queue_proceed_at_once(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let lock = env.lock(kind, LONG).await;
    let held = lock.take("sale").await;
    let waiter = lock.spawn_waiter("sale", LONG_WAIT);
    eventually("the waiter listens", async || {
        env.listeners(&lock.key("sale")).await > 0
    })
    .await;
    let forced = Instant::now();
    assert!(lock.reentrant().force_release("sale").await.unwrap());
    let (_next, at) = waiter.await.unwrap().unwrap();
    assert!(at - forced < AT_ONCE, "{:?}", at - forced);
    assert!(held.is_lost());
    assert_eq!(held.release().await.unwrap(), Released::NotOwner);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_release_happens_even_if_its_future_is_dropped(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let lock = env.lock(kind, LONG).await;
    drop(lock.take("dropped").await);
    drop(lock.take("not polled").await.release());
    assert!(!dropped_after(1, lock.take("polled once").await.release()).await);
    for name in ["dropped", "not polled", "polled once"] {
        eventually(name, async || env.pttl(&lock.key(name)).await == -2).await;
    }
}

/// Without a runtime no command can be sent: the drop does not block, and the watchdog has stopped.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_guard_dropped_outside_of_a_runtime_leaves_the_lock_to_its_lease(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let (here, there) = (env.lock(kind, RENEWED).await, env.lock(kind, RENEWED).await);
    let (held, other) = (here.take("sale").await, here.take("other").await);
    std::thread::spawn(move || drop(held)).join().unwrap();
    let dropped = Instant::now();
    let released = std::thread::spawn(move || {
        let mut releasing = std::pin::pin!(other.release());
        releasing.as_mut().poll(&mut Context::from_waker(Waker::noop()))
    });
    // No release was sent: the lock may still be held.
    let released = released.join().unwrap();
    assert!(matches!(released, Poll::Ready(Err(LockError::NoRuntime))));
    assert!(there.rejects_others("sale").await);
    let (_next, at) = there.spawn_waiter("sale", LONG_WAIT).await.unwrap().unwrap();
    assert!(at - dropped < RENEWED.duration() + AT_ONCE, "{:?}", at - dropped);
}

/// The lock is free once it is deleted, whether or not its message may be published.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_release_succeeds_although_its_message_is_rejected(#[case] kind: Kind) {
    let server = Redis::private().await.unwrap();
    let mut env = LockEnvironment::on(&server).await;
    let rules = ["ACL", "SETUSER", "app", "on", ">secret", "~*", "+@all", "resetchannels"];
    assert_eq!(env.command::<String>(&rules).await, "OK");
    env.url = format!("redis://app:secret@{}/0", server.report().address);
    let rejected: redis::RedisResult<i64> = redis::Cmd::publish("channel", "")
        .query_async(&mut raw(&env.url).await)
        .await;
    assert_eq!(rejected.unwrap_err().code(), Some("NOPERM"), "the fault did not strike");

    let lock = env.lock(kind, LONG).await;
    let held = lock.take("sale").await;
    assert_eq!(held.release().await.unwrap(), Released::Free);
    let _held = lock.take("sale").await;
    assert!(lock.reentrant().force_release("sale").await.unwrap());
    drop(lock.take("sale").await);
}
