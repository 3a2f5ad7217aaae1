//! The HTTP contract, and slow clients.

use super::*;

#[rstest]
#[case::mutex("mutex")]
#[case::pessimistic("pessimistic")]
#[case::optimistic("optimistic")]
#[case::conditional_update("conditional-update")]
#[tokio::test]
async fn the_http_contract_holds(#[case] name: &str) {
    http_contract::holds(&program(), &LEVEL, strategy(name)).await.unwrap();
}

#[tokio::test]
async fn idle_slow_and_endless_clients_keep_nobody_waiting() {
    slow_clients::keep_nobody_waiting(&program(), &LEVEL, strategy("pessimistic"))
        .await
        .unwrap();
}
