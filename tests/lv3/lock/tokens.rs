//! Fencing tokens: each is greater than all before it.

use super::*;

#[tokio::test]
async fn every_acquisition_gets_a_greater_token_than_all_before_it() {
    let env = LockEnvironment::shared().await;
    let mut last = 0_i64;
    for round in 0..4 {
        // New connections in each round.
        let here = env.lock(Fenced, LONG).await;
        let there = env.lock(Fenced, RENEWED).await;
        for _ in 0..10 {
            let held = here.take("sale").await;
            assert_greater_token(&mut last, &held);
            let waiter = there.spawn_waiter("sale", LONG_WAIT);
            assert_eq!(held.release().await.unwrap(), Released::Free);
            let (held, _) = waiter.await.unwrap().unwrap();
            assert_greater_token(&mut last, &held);
            assert_eq!(held.release().await.unwrap(), Released::Free);
        }
        let ends = env.lock(Fenced, SHORT).await.take("sale").await;
        assert_greater_token(&mut last, &ends);
        lost(&ends).await;
        let forced = there.acquire("sale", &Owner::fresh(), LONG_WAIT).await.unwrap();
        assert_greater_token(&mut last, &forced);
        assert!(here.reentrant().force_release("sale").await.unwrap());
        drop(forced);
        let token = format!("{}:token", here.key("sale"));
        match round {
            // Redis loses the last token.
            0 | 2 => assert_eq!(env.command::<i64>(&["DEL", &token]).await, 1),
            // The last token is an hour ahead, as if the clock had been set back.
            3 => {
                last += 3_600_000_000;
                let set: String = env.command(&["SET", &token, &last.to_string()]).await;
                assert_eq!(set, "OK");
            }
            _ => {}
        }
        let held = here.acquire("sale", &Owner::fresh(), LONG_WAIT).await.unwrap();
        assert_greater_token(&mut last, &held);
        assert_eq!(held.release().await.unwrap(), Released::Free);
    }
}

/// Asserts that the token is greater than the last one, and records it.
fn assert_greater_token(last: &mut i64, guard: &Guard) {
    let token = guard.token().expect("a token");
    assert!(token > *last, "{token} after {last}");
    *last = token;
}

#[tokio::test]
async fn a_reentrant_acquisition_keeps_its_token() {
    let env = LockEnvironment::shared().await;
    let lock = env.lock(Fenced, LONG).await;
    let owner = Owner::fresh();
    let first = lock.acquire("sale", &owner, LONG_WAIT).await.unwrap();
    let second = lock.acquire("sale", &owner, LONG_WAIT).await.unwrap();
    assert_eq!(first.token(), second.token());
    // Redis loses the last token while the lock is held: a greater one is issued.
    let token = format!("{}:token", lock.key("sale"));
    assert_eq!(env.command::<i64>(&["DEL", &token]).await, 1);
    let third = lock.acquire("sale", &owner, LONG_WAIT).await.unwrap();
    assert!(third.token() > first.token());
    for (guard, released) in [
        (third, Released::StillHeld(2)),
        (second, Released::StillHeld(1)),
        (first, Released::Free),
    ] {
        assert_eq!(guard.release().await.unwrap(), released);
    }
    for kind in [Rlock, Spin] {
        let lock = env.lock(kind, LONG).await;
        assert_eq!(lock.take(&format!("{kind:?}")).await.token(), None);
    }
}
