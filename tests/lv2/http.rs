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
    let environment = TestEnvironment::shared(strategy).await.unwrap();
    let server = TestServer::start(&environment, &program(), &LEVEL, strategy)
        .await
        .unwrap();

    sells_refuses_and_repeats(&server).await.unwrap();
    refuses_bad_input(&server).await.unwrap();
    let sale = server.sale(SALE).await.unwrap();
    assert_eq!((sale.stock, sale.reserved), (0, 2), "bad input sold something");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn idle_slow_and_endless_clients_keep_nobody_waiting() {
    let strategy = strategy("pessimistic");
    let environment = TestEnvironment::shared(strategy).await.unwrap();
    let server = TestServer::start(&environment, &program(), &LEVEL, strategy)
        .await
        .unwrap();
    let kib = withstands_idle_and_slow_clients(&server).await.unwrap();
    println!("they cost {kib} KiB");
    server.stop().await.unwrap();
}
