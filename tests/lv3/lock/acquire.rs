//! Acquisition: mutual exclusion, reentrancy, and what others see of a held lock.

use super::*;

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn others_are_rejected_at_once_and_change_nothing(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let (here, there) = (env.lock(kind, LONG).await, env.lock(kind, LONG).await);
    let key = here.key("sale");
    let held = here.take("sale").await;
    let before: Vec<u8> = env.command(&["DUMP", &key]).await;

    let began = Instant::now();
    let mut left = env.pttl(&key).await;
    for _ in 0..50 {
        assert!(here.rejects_others("sale").await && there.rejects_others("sale").await);
        let now = env.pttl(&key).await;
        assert!(0 < now && now <= left, "{now} ms left, after {left}");
        left = now;
    }
    assert!(began.elapsed() < ms(10_000), "{:?} for 100 refusals", began.elapsed());
    assert_eq!(env.command::<Vec<u8>>(&["DUMP", &key]).await, before);
    assert_eq!(held.release().await.unwrap(), Released::Free);
    drop(there.take("sale").await);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn the_owner_and_the_ttl_of_a_lock_can_be_read(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let (here, there) = (env.lock(kind, LONG).await, env.lock(kind, LONG).await);
    assert_eq!(there.reentrant().info("sale").await.unwrap(), None);
    let owner = Owner::fresh();
    let held = here.try_acquire("sale", &owner).await.unwrap().unwrap();
    let seen = there.reentrant().info("sale").await.unwrap().unwrap();
    assert_eq!((seen.owner.as_str(), seen.hold_count), (owner.as_str(), 1));
    assert!(Duration::ZERO < seen.ttl && seen.ttl <= LONG.duration(), "{seen:?}");
    assert_eq!(held.release().await.unwrap(), Released::Free);
    assert_eq!(there.reentrant().info("sale").await.unwrap(), None);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn an_owner_acquires_it_again_and_releases_it_as_often(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let (here, there) = (env.lock(kind, LONG).await, env.lock(kind, LONG).await);
    let owner = Owner::fresh();
    // By every method, and through another handle.
    let first = here.acquire("sale", &owner, LONG_WAIT).await.unwrap();
    let second = here.acquire("sale", &owner, Duration::ZERO).await.unwrap();
    let third = here.try_acquire("sale", &owner).await.unwrap().unwrap();
    let fourth = there.acquire("sale", &owner, LONG_WAIT).await.unwrap();
    assert_eq!(here.reentrant().info("sale").await.unwrap().unwrap().hold_count, 4);

    let elsewhere = env.lock(kind, LONG).await;
    let waiter = elsewhere.spawn_waiter("sale", LONG_WAIT);
    eventually("the waiter listens", async || {
        env.listeners(&here.key("sale")).await > 0
    })
    .await;
    assert_eq!(first.release().await.unwrap(), Released::StillHeld(3));
    assert_eq!(fourth.release().await.unwrap(), Released::StillHeld(2));
    assert_eq!(second.release().await.unwrap(), Released::StillHeld(1));
    assert!(elsewhere.rejects_others("sale").await && here.rejects_others("sale").await);
    assert!(!waiter.is_finished());
    let freed = Instant::now();
    assert_eq!(third.release().await.unwrap(), Released::Free);
    let (_held, at) = waiter.await.unwrap().unwrap();
    assert!(at - freed < AT_ONCE, "{:?}", at - freed);
}

/// Other tasks of one owner, on any thread, acquire the lock again.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn an_owner_is_not_a_thread(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let lock = env.lock(kind, LONG).await;
    let owner = Owner::fresh();
    let mut guards = vec![lock.acquire("sale", &owner, LONG_WAIT).await.unwrap()];
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let (lock, owner) = (lock.clone(), owner.clone());
            tokio::spawn(async move { lock.acquire("sale", &owner, LONG_WAIT).await.unwrap() })
        })
        .collect();
    for task in tasks {
        guards.push(task.await.unwrap());
    }
    for left in (1..guards.len()).rev() {
        let released = guards.pop().unwrap().release().await.unwrap();
        assert_eq!(released, Released::StillHeld(left as u64));
    }
    assert_eq!(guards.pop().unwrap().release().await.unwrap(), Released::Free);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn a_reentrant_acquisition_restarts_the_lease_and_a_partial_release_does_not(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let lock = env.lock(kind, MEDIUM).await;
    let (key, owner) = (lock.key("sale"), Owner::fresh());
    let began = Instant::now();
    let first = lock.try_acquire("sale", &owner).await.unwrap().unwrap();
    eventually("a part of the lease is over", async || env.pttl(&key).await < 2_900).await;
    let again = Instant::now();
    let second = lock.try_acquire("sale", &owner).await.unwrap().unwrap();
    let fresh = env.pttl(&key).await;
    let least = 3_000 - i64::try_from(again.elapsed().as_millis()).unwrap();
    assert!((least - 2..=3_000).contains(&fresh), "{fresh} ms left");
    assert_eq!(second.release().await.unwrap(), Released::StillHeld(1));
    let after = env.pttl(&key).await;
    assert!(0 < after && after <= fresh, "{after} ms left, after {fresh}");
    // All guards of one owner share the lease.
    eventually("it ends", async || first.is_lost()).await;
    assert!(began.elapsed() >= ms(3_100), "{:?}", began.elapsed());
    assert!(again.elapsed() >= ms(3_000), "{:?}", again.elapsed());
    lost(&first).await;
}

#[tokio::test]
async fn spin_is_not_reentrant() {
    let env = LockEnvironment::shared().await;
    let lock = env.lock(Spin, LONG).await;
    let owner = Owner::fresh();
    let held = lock.acquire("sale", &owner, LONG_WAIT).await.unwrap();
    assert!(lock.try_acquire("sale", &owner).await.unwrap().is_none());
    let again = lock.acquire("sale", &owner, ms(50)).await;
    assert!(matches!(again, Err(LockError::NotAcquired(_))));
    assert_eq!(held.release().await.unwrap(), Released::Free);
    drop(lock.take("sale").await);
}
