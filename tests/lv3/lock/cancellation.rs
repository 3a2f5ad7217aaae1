//! Attempts that are cancelled or fail leave nothing behind, and release nothing else.

use super::*;

/// The owner holds the lock through another handle. An attempt that Redis answered with an error
/// has acquired nothing, and must release nothing.
#[tokio::test]
async fn a_failed_attempt_releases_nothing_that_its_owner_holds() {
    let env = LockEnvironment::shared().await;
    let (here, there) = (env.lock(Fenced, LONG).await, env.lock(Fenced, LONG).await);
    let (key, owner) = (here.key("sale"), Owner::fresh());
    let held = here.acquire("sale", &owner, LONG_WAIT).await.unwrap();
    // The key of the last token has the wrong type: the script fails before its first write.
    let token = format!("{key}:token");
    assert_eq!(env.command::<i64>(&["DEL", &token]).await, 1);
    assert_eq!(env.command::<i64>(&["RPUSH", &token, "no token"]).await, 1);
    let monitor = env.monitor().await;
    let refused = there.try_acquire("sale", &owner).await;
    assert!(matches!(refused, Err(LockError::Redis(_))));
    eventually("the attempt is released", async || {
        monitor.calls(&env, &key).await.len() >= 2
    })
    .await;
    assert!(env.pttl(&key).await > 0, "its owner has it no more");
    assert_eq!(held.release().await.unwrap(), Released::Free);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_cancelled_acquisition_is_released(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let lock = env.lock(kind, LONG).await;
    let mut polls = 0;
    loop {
        let done = dropped_after(polls, lock.acquire("sale", &Owner::fresh(), LONG_WAIT)).await;
        eventually("it is free", async || env.pttl(&lock.key("sale")).await == -2).await;
        if done {
            break;
        }
        polls += 1;
    }
    assert!(polls > 0, "it was never cancelled");
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_cancelled_wait_leaves_nothing_behind(#[case] kind: Kind) {
    let env = LockEnvironment::shared().await;
    let (here, there) = (env.lock(kind, LONG).await, env.lock(kind, LONG).await);
    let key = here.key("sale");
    let held = here.take("sale").await;
    let before: Vec<u8> = env.command(&["DUMP", &key]).await;
    let waits = (0..100_u64).map(|number| {
        let lock = if number % 2 == 0 { &here } else { &there };
        async move {
            let owner = Owner::fresh();
            let waiting = lock.acquire("sale", &owner, LONG_WAIT);
            assert!(
                tokio::time::timeout(ms(rand::random_range(0..40)), waiting)
                    .await
                    .is_err()
            );
        }
    });
    futures_util::future::join_all(waits).await;
    eventually("there are no subscribers", async || env.listeners(&key).await == 0).await;
    assert_eq!(env.command::<Vec<u8>>(&["DUMP", &key]).await, before);
    assert_eq!(held.release().await.unwrap(), Released::Free);
    for lock in [here, there] {
        assert_eq!(lock.take("sale").await.release().await.unwrap(), Released::Free);
    }
}

/// A cancelled attempt is released. That must not release another acquisition of its owner.
#[tokio::test]
async fn a_holder_that_cancels_a_second_attempt_keeps_its_lock() {
    let env = LockEnvironment::shared().await;
    let lock = env.lock(Spin, LONG).await;
    let owner = Owner::fresh();
    let held = lock.acquire("sale", &owner, LONG_WAIT).await.unwrap();
    let monitor = env.monitor().await;
    assert!(!dropped_after(1, lock.try_acquire("sale", &owner)).await);
    eventually("the attempt is released", async || {
        let calls = monitor.calls(&env, &lock.key("sale")).await;
        calls.iter().any(|call| call.contains("EVALSHA"))
    })
    .await;
    assert!(env.pttl(&lock.key("sale")).await > 0);
    assert_eq!(held.release().await.unwrap(), Released::Free);
}
