//! The payment service by itself: see [`lv4_kafka::payment_service`].

use clap::Parser;
use lv4_kafka::payment_service::{PaymentServiceArgs, serve};

/// A payment service that misbehaves on demand
#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    service: PaymentServiceArgs,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    serve(Arguments::parse().service).await
}
