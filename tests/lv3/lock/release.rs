//! Release: by the owner, after the lease, by force, and by a dropped guard.

use super::*;

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_release_after_the_lease_says_so_and_leaves_the_successor_alone(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(kind, SHORT).await, ground.lock(kind, LONG).await);
    let late = here.take("sale").await;
    let (successor, _) = there.waits("sale", PATIENT).await.unwrap().unwrap();
    let left = ground.pttl(&here.key("sale")).await;
    assert_eq!(late.release().await.unwrap(), Released::NotOwner);
    let after = ground.pttl(&here.key("sale")).await;
    assert!(0 < after && after <= left, "{after} ms left, after {left}");
    assert!(here.refuses("sale").await && !successor.is_lost());
    assert_eq!(successor.release().await.unwrap(), Released::Free);
}

#[rstest]
#[case::rlock(Rlock, 0)]
#[case::fenced(Fenced, 1)]
#[case::spin(Spin, 0)]
#[tokio::test]
async fn after_the_last_release_nothing_is_left_but_the_last_token(#[case] kind: Kind, #[case] keys: i64) {
    let server = Redis::private().await.unwrap();
    let ground = Ground::on(&server).await;
    let (here, there) = (ground.lock(kind, LONG).await, ground.lock(kind, LONG).await);
    for _ in 0..30 {
        let held = here.take("sale").await;
        let waiting = [&here, &there, &there].map(|lock| async {
            let next = lock.acquire("sale", &Owner::fresh(), PATIENT).await.unwrap();
            assert_eq!(next.release().await.unwrap(), Released::Free);
        });
        let releasing = async { assert_eq!(held.release().await.unwrap(), Released::Free) };
        tokio::join!(releasing, futures_util::future::join_all(waiting));
    }
    eventually("nobody listens", async || {
        ground.ask::<Vec<String>>(&["PUBSUB", "CHANNELS"]).await.is_empty()
    })
    .await;
    let left: Vec<String> = ground.ask(&["KEYS", "*"]).await;
    assert_eq!(ground.ask::<i64>(&["DBSIZE"]).await, keys, "{left:?}");
    // It goes by itself: anybody can make up a name.
    for key in left {
        let left = ground.pttl(&key).await;
        assert!(0 < left && left <= 86_400_000, "{key}: {left} ms");
    }
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn forced_open_it_is_free_and_its_holder_finds_out(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let holder = ground.lock(kind, RENEWED).await;
    let (elsewhere, anybody) = (ground.lock(kind, LONG).await, ground.lock(kind, LONG).await);
    let owner = Owner::fresh();
    let first = holder.acquire("sale", &owner, PATIENT).await.unwrap();
    let second = holder.acquire("sale", &owner, PATIENT).await.unwrap();
    let waiter = elsewhere.waits("sale", PATIENT);
    eventually("the waiter listens", async || {
        ground.listeners(&holder.key("sale")).await > 0
    })
    .await;

    let forced = Instant::now();
    assert!(anybody.reentrant().force_release("sale").await.unwrap());
    let (next, at) = waiter.await.unwrap().unwrap();
    assert!(at - forced < PROMPTLY, "{:?}", at - forced);
    // By its next renewal.
    first.lost().await;
    assert!(first.is_lost() && second.is_lost());
    let monitor = ground.monitor().await;
    assert_eq!(first.release().await.unwrap(), Released::NotOwner);
    assert_eq!(second.release().await.unwrap(), Released::NotOwner);
    assert!(!next.is_lost() && anybody.refuses("sale").await);
    let began = Instant::now();
    eventually("a lease is over", async || began.elapsed() > OVER).await;
    let mut renewals = monitor.about(&ground, "\"pexpire\"").await;
    renewals.retain(|line| line.contains(&holder.key("sale")));
    assert_eq!(renewals, [""; 0]);
    assert_eq!(next.release().await.unwrap(), Released::Free);
    assert!(!anybody.reentrant().force_release("sale").await.unwrap());
}

/// Who waits in the holder's own process waits for the holder first.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn forced_open_by_its_own_process_it_is_free_at_once_there_too(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, LONG).await;
    let held = lock.take("sale").await;
    let waiter = lock.waits("sale", PATIENT);
    eventually("the waiter listens", async || {
        ground.listeners(&lock.key("sale")).await > 0
    })
    .await;
    let forced = Instant::now();
    assert!(lock.reentrant().force_release("sale").await.unwrap());
    let (_next, at) = waiter.await.unwrap().unwrap();
    assert!(at - forced < PROMPTLY, "{:?}", at - forced);
    assert!(held.is_lost());
    assert_eq!(held.release().await.unwrap(), Released::NotOwner);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_release_happens_whether_or_not_anybody_waits_for_it(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, LONG).await;
    drop(lock.take("dropped").await);
    drop(lock.take("not polled").await.release());
    assert!(!dropped_after(1, lock.take("polled once").await.release()).await);
    for name in ["dropped", "not polled", "polled once"] {
        eventually(name, async || ground.pttl(&lock.key(name)).await == -2).await;
    }
}

/// Where there is no runtime, nobody can talk to Redis. Nothing blocks, and nobody renews.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_guard_dropped_outside_of_a_runtime_leaves_the_lock_to_its_lease(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(kind, RENEWED).await, ground.lock(kind, RENEWED).await);
    let (held, other) = (here.take("sale").await, here.take("other").await);
    std::thread::spawn(move || drop(held)).join().unwrap();
    let dropped = Instant::now();
    let released = std::thread::spawn(move || {
        let mut releasing = std::pin::pin!(other.release());
        releasing.as_mut().poll(&mut Context::from_waker(Waker::noop()))
    });
    // Nobody has asked: it may still be the owner's.
    let released = released.join().unwrap();
    assert!(matches!(released, Poll::Ready(Err(LockError::NoRuntime))));
    assert!(there.refuses("sale").await);
    let (_next, at) = there.waits("sale", PATIENT).await.unwrap().unwrap();
    assert!(at - dropped < RENEWED.duration() + PROMPTLY, "{:?}", at - dropped);
}
