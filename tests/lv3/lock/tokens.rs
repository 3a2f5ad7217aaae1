//! Fencing tokens: each is greater than all before it.

use super::*;

#[tokio::test]
async fn every_acquisition_gets_a_greater_token_than_all_before_it() {
    let ground = Ground::shared().await;
    let mut last = 0_i64;
    for round in 0..4 {
        // New clients in each round.
        let here = ground.lock(Fenced, LONG).await;
        let there = ground.lock(Fenced, RENEWED).await;
        for _ in 0..10 {
            let held = here.take("sale").await;
            grows(&mut last, &held);
            let waiter = there.waits("sale", PATIENT);
            assert_eq!(held.release().await.unwrap(), Released::Free);
            let (held, _) = waiter.await.unwrap().unwrap();
            grows(&mut last, &held);
            assert_eq!(held.release().await.unwrap(), Released::Free);
        }
        let ends = ground.lock(Fenced, SHORT).await.take("sale").await;
        grows(&mut last, &ends);
        ends.lost().await;
        let forced = there.acquire("sale", &Owner::fresh(), PATIENT).await.unwrap();
        grows(&mut last, &forced);
        assert!(here.reentrant().force_release("sale").await.unwrap());
        drop(forced);
        let token = format!("{}:token", here.key("sale"));
        match round {
            // The last token is lost.
            0 | 2 => assert_eq!(ground.ask::<i64>(&["DEL", &token]).await, 1),
            // The clock is set back by an hour, as far as the last token can tell.
            3 => {
                last += 3_600_000_000;
                let set: String = ground.ask(&["SET", &token, &last.to_string()]).await;
                assert_eq!(set, "OK");
            }
            _ => {}
        }
        let held = here.acquire("sale", &Owner::fresh(), PATIENT).await.unwrap();
        grows(&mut last, &held);
        assert_eq!(held.release().await.unwrap(), Released::Free);
    }
}

/// Notes a token, which is greater than the last one.
fn grows(last: &mut i64, guard: &Guard) {
    let token = guard.token().expect("a token");
    assert!(token > *last, "{token} after {last}");
    *last = token;
}

#[tokio::test]
async fn a_token_stays_when_its_owner_takes_the_lock_again() {
    let ground = Ground::shared().await;
    let lock = ground.lock(Fenced, LONG).await;
    let owner = Owner::fresh();
    let first = lock.acquire("sale", &owner, PATIENT).await.unwrap();
    let second = lock.acquire("sale", &owner, PATIENT).await.unwrap();
    assert_eq!(first.token(), second.token());
    // The last token is lost under its owner: then a greater one is as good.
    let token = format!("{}:token", lock.key("sale"));
    assert_eq!(ground.ask::<i64>(&["DEL", &token]).await, 1);
    let third = lock.acquire("sale", &owner, PATIENT).await.unwrap();
    assert!(third.token() > first.token());
    for (guard, released) in [
        (third, Released::StillHeld(2)),
        (second, Released::StillHeld(1)),
        (first, Released::Free),
    ] {
        assert_eq!(guard.release().await.unwrap(), released);
    }
    for kind in [Rlock, Spin] {
        let lock = ground.lock(kind, LONG).await;
        assert_eq!(lock.take(&format!("{kind:?}")).await.token(), None);
    }
}
