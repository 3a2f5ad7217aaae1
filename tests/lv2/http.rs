//! The HTTP contract, and slow clients.

use super::*;

#[rstest]
#[case::mutex("mutex")]
#[case::pessimistic("pessimistic")]
#[case::optimistic("optimistic")]
#[case::conditional_update("conditional-update")]
#[tokio::test]
async fn the_http_contract_holds(#[case] name: &str) {
    let strategy = strategy(name);
    let stand = TestEnvironment::shared(strategy).await.unwrap();
    let talk = TestServer::start(&stand, &program(), &LEVEL, strategy).await.unwrap();

    sells_refuses_and_repeats(&talk).await.unwrap();
    refuses_bad_input(&talk).await.unwrap();
    let sale = talk.sale(SALE).await.unwrap();
    assert_eq!((sale.stock, sale.reserved), (0, 2), "bad input sold something");
    talk.stop().await.unwrap();
}

#[tokio::test]
async fn idle_slow_and_endless_clients_keep_nobody_waiting() {
    let strategy = strategy("pessimistic");
    let stand = TestEnvironment::shared(strategy).await.unwrap();
    let talk = TestServer::start(&stand, &program(), &LEVEL, strategy).await.unwrap();
    let kib = withstands_idle_and_slow_clients(&talk).await.unwrap();
    println!("they cost {kib} KiB");
    talk.stop().await.unwrap();
}
