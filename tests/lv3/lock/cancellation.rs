//! Attempts that are cancelled or fail leave nothing behind, and release nothing else.

use super::*;

/// The lock is this owner's by another handle. An attempt that Redis answered with an error has taken nothing, and must give back nothing.
#[tokio::test]
async fn an_attempt_that_failed_gives_back_nothing_that_its_owner_has() {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(Fenced, LONG).await, ground.lock(Fenced, LONG).await);
    let (key, owner) = (here.key("sale"), Owner::fresh());
    let held = here.acquire("sale", &owner, PATIENT).await.unwrap();
    // What ought to be the last token is none: the script fails before it has done anything.
    let token = format!("{key}:token");
    assert_eq!(ground.ask::<i64>(&["DEL", &token]).await, 1);
    assert_eq!(ground.ask::<i64>(&["RPUSH", &token, "no token"]).await, 1);
    let monitor = ground.monitor().await;
    let refused = there.try_acquire("sale", &owner).await;
    assert!(matches!(refused, Err(LockError::Redis(_))));
    eventually("the attempt is given back", async || {
        monitor.calls(&ground, &key).await.len() >= 2
    })
    .await;
    assert!(ground.pttl(&key).await > 0, "its owner has it no more");
    assert_eq!(held.release().await.unwrap(), Released::Free);
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_lock_whose_taking_is_cancelled_is_given_back(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let lock = ground.lock(kind, LONG).await;
    let mut polls = 0;
    loop {
        let done = dropped_after(polls, lock.acquire("sale", &Owner::fresh(), PATIENT)).await;
        eventually("it is free", async || ground.pttl(&lock.key("sale")).await == -2).await;
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
async fn a_wait_that_is_cancelled_leaves_nothing(#[case] kind: Kind) {
    let ground = Ground::shared().await;
    let (here, there) = (ground.lock(kind, LONG).await, ground.lock(kind, LONG).await);
    let key = here.key("sale");
    let held = here.take("sale").await;
    let before: Vec<u8> = ground.ask(&["DUMP", &key]).await;
    let waits = (0..100_u64).map(|number| {
        let lock = if number % 2 == 0 { &here } else { &there };
        async move {
            let owner = Owner::fresh();
            let waiting = lock.acquire("sale", &owner, PATIENT);
            assert!(
                tokio::time::timeout(ms(rand::random_range(0..40)), waiting)
                    .await
                    .is_err()
            );
        }
    });
    futures_util::future::join_all(waits).await;
    eventually("nobody listens", async || ground.listeners(&key).await == 0).await;
    assert_eq!(ground.ask::<Vec<u8>>(&["DUMP", &key]).await, before);
    assert_eq!(held.release().await.unwrap(), Released::Free);
    for lock in [here, there] {
        assert_eq!(lock.take("sale").await.release().await.unwrap(), Released::Free);
    }
}

/// An attempt that is cancelled is given back. That must not give back what its owner has.
#[tokio::test]
async fn a_holder_who_tries_again_and_cancels_keeps_its_lock() {
    let ground = Ground::shared().await;
    let lock = ground.lock(Spin, LONG).await;
    let owner = Owner::fresh();
    let held = lock.acquire("sale", &owner, PATIENT).await.unwrap();
    let monitor = ground.monitor().await;
    assert!(!dropped_after(1, lock.try_acquire("sale", &owner)).await);
    eventually("the attempt is given back", async || {
        let calls = monitor.calls(&ground, &lock.key("sale")).await;
        calls.iter().any(|call| call.contains("EVALSHA"))
    })
    .await;
    assert!(ground.pttl(&lock.key("sale")).await > 0);
    assert_eq!(held.release().await.unwrap(), Released::Free);
}
