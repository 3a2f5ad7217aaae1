//! A Redis that is down, frozen, unreachable, or has lost its script cache.

use super::*;

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn nobody_notices_that_redis_forgot_the_scripts(#[case] kind: Kind) {
    let server = Redis::private().await.unwrap();
    let ground = Ground::on(&server).await;
    let lock = ground.lock(kind, RENEWED).await;
    let flush = async || assert_eq!(ground.ask::<String>(&["SCRIPT", "FLUSH"]).await, "OK");
    for round in 0..10 {
        let owner = Owner::fresh();
        flush().await;
        let held = lock.acquire("sale", &owner, PATIENT).await.unwrap();
        if round == 0 {
            flush().await;
            let began = Instant::now();
            eventually("a lease is over", async || began.elapsed() > OVER).await;
            assert!(!held.is_lost());
        }
        if kind != Spin {
            flush().await;
            let again = lock.acquire("sale", &owner, PATIENT).await.unwrap();
            flush().await;
            assert_eq!(again.release().await.unwrap(), Released::StillHeld(1));
        }
        flush().await;
        assert_eq!(held.release().await.unwrap(), Released::Free);
        if kind != Spin {
            let _held = lock.take("sale").await;
            flush().await;
            assert!(lock.reentrant().force_release("sale").await.unwrap());
        }
    }
}

/// The same client works again, without being told.
async fn answers_again(lock: &Lock) {
    eventually("the client reaches Redis", async || {
        lock.connections().send::<String>(redis::cmd("PING")).await.is_ok()
    })
    .await;
}

#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn without_redis_there_is_an_error_and_afterwards_a_lock_again(#[case] kind: Kind) {
    let server = Redis::private().await.unwrap();
    let ground = Ground::on(&server).await;
    let lock = ground.lock(kind, RENEWED).await;
    let held = lock.take("held").await;
    let token = held.token();
    server.kill().await.unwrap();

    for wait in [Duration::ZERO, ms(300), PATIENT] {
        let began = Instant::now();
        let error = lock.acquire("sale", &Owner::fresh(), wait).await.err();
        assert!(
            matches!(error, Some(LockError::Redis(_) | LockError::NotAcquired(_))),
            "{error:?}"
        );
        // A wait may end before the command does.
        assert!(
            wait == ms(300) || matches!(error, Some(LockError::Redis(_))),
            "{error:?}"
        );
        assert!(began.elapsed() < ms(10_000), "it hangs: {:?}", began.elapsed());
    }
    // Nobody can renew it any more, and its holder is told.
    held.lost().await;
    server.start().await.unwrap();
    answers_again(&lock).await;
    // It came back empty.
    assert_eq!(held.release().await.unwrap(), Released::NotOwner);
    let again = lock.take("held").await;
    assert!(token.is_none() || again.token() > token);
    let began = Instant::now();
    eventually("a lease is over", async || began.elapsed() > OVER).await;
    assert!(!again.is_lost());
    assert_eq!(again.release().await.unwrap(), Released::Free);
}

/// It answers nobody, and hangs up on nobody.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[case::spin(Spin)]
#[tokio::test]
async fn a_redis_that_stands_still_holds_up_neither_an_error_nor_the_notice_of_a_loss(#[case] kind: Kind) {
    let server = Redis::private().await.unwrap();
    let ground = Ground::on(&server).await;
    let lock = ground.lock(kind, Lease::Renewed(ms(900))).await;
    let sent = Instant::now();
    let held = lock.take("sale").await;
    assert_eq!(ground.ask::<String>(&["CLIENT", "PAUSE", "4000", "ALL"]).await, "OK");
    let waiting = async {
        let began = Instant::now();
        let error = lock.acquire("other", &Owner::fresh(), PATIENT).await.err();
        (error, began.elapsed())
    };
    let lost = async {
        held.lost().await;
        sent.elapsed()
    };
    let ((error, took), lost) = tokio::join!(waiting, lost);
    assert!(matches!(error, Some(LockError::Redis(_))), "{error:?}");
    // By themselves, and not because Redis goes on.
    assert!(took < ms(4_000), "{took:?}");
    assert!(ms(900) <= lost && lost < ms(4_000), "{lost:?}");
}

/// The queue of a process must not find out one by one, each with a time-out of its own, what the first of them knows.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn all_who_queue_in_a_process_hear_at_once_that_redis_does_not_answer(#[case] kind: Kind) {
    const WAITERS: usize = 20;

    let server = Redis::private().await.unwrap();
    let (ground, proxy) = behind_a_proxy(&server).await;
    let lock = ground.lock(kind, LONG).await;
    let key = lock.key("sale");
    // Somebody has it, for so long that all of them queue by then.
    let _: i64 = ground.ask(&["HSET", &key, "somebody", "1"]).await;
    let _: i64 = ground.ask(&["PEXPIRE", &key, "3000"]).await;
    let waiters: Vec<_> = (0..WAITERS).map(|_| lock.waits("sale", PATIENT)).collect();
    eventually("they listen", async || ground.listeners(&key).await == 1).await;
    proxy.cuts(Cut::Silence(""));
    for waiter in waiters {
        let told = waiter.await.unwrap();
        assert!(matches!(told, Err(LockError::Redis(_))), "{:?}", told.err());
    }
    assert!(proxy.connections_silenced() > 0, "the fault did not strike");
    let asked = proxy.said_in_vain();
    assert!(asked < WAITERS as u64, "Redis was asked {asked} times");
}

/// What went wrong once is no reason for those who come later: they wait, as the lock is taken, and not gone.
#[rstest]
#[case::rlock(Rlock)]
#[case::fenced(Fenced)]
#[tokio::test]
async fn after_a_failure_others_of_the_process_wait_again(#[case] kind: Kind) {
    let server = Redis::private().await.unwrap();
    let (behind, proxy) = behind_a_proxy(&server).await;
    let (lock, other) = (
        behind.lock(kind, LONG).await,
        Ground::on(&server).await.lock(kind, LONG).await,
    );
    proxy.cuts(Cut::Everything);
    let failed = lock.acquire("sale", &Owner::fresh(), PATIENT).await.err();
    assert!(
        matches!(failed, Some(LockError::Redis(_))),
        "the fault did not strike: {failed:?}"
    );
    proxy.cuts(Cut::Nothing);
    answers_again(&lock).await;

    let held = other.take("sale").await;
    let waiters = [lock.waits("sale", PATIENT), lock.waits("sale", PATIENT)];
    eventually("they listen", async || behind.listeners(&lock.key("sale")).await == 1).await;
    assert_eq!(held.release().await.unwrap(), Released::Free);
    for waiter in waiters {
        let (got, _) = waiter.await.unwrap().unwrap();
        assert_eq!(got.release().await.unwrap(), Released::Free);
    }
}
