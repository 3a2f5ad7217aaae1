//! The client of the payment service.
//!
//! Every call carries the reservation's id as its idempotency key, so a repeat is the same charge,
//! or the same refund. An answer counts only if it is complete and understood. Anything else is an
//! unknown outcome: a timeout, a broken connection, a 500, text that is no JSON, a body that is too
//! large or never ends.

use std::time::Duration;

use box_office::BuyerId;
use reqwest::{Client, StatusCode, Url, redirect::Policy};
use serde::Deserialize;
use serde_json::json;
use uuid::Uuid;

/// The maximum size of an answer, in bytes: many times what a payment service has to say.
const MAX_ANSWER_BYTES: usize = 64 * 1024;

/// Asks the payment service for charges and refunds.
#[derive(Clone)]
pub struct PaymentClient {
    http: Client,
    charges: Url,
    refunds: Url,
}

/// The outcome of a charge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Charge {
    /// The money is taken.
    Approved,
    /// No money is taken, and none will be under this key.
    Declined,
}

/// The outcome of a call is unknown: it has to be asked for again, with the same key.
#[derive(Debug, thiserror::Error)]
pub enum UnknownOutcome {
    /// No complete answer in time.
    #[error("the payment service did not answer: {0}")]
    NoAnswer(#[from] reqwest::Error),
    /// The answer is too large.
    #[error("the payment service answered with more than {MAX_ANSWER_BYTES} bytes")]
    TooLarge,
    /// The answer is none of those that this client knows.
    #[error("the payment service answered {0} with a body that is not understood")]
    NotUnderstood(StatusCode),
}

#[derive(Deserialize)]
struct Answer {
    status: String,
}

impl PaymentClient {
    /// Creates a client of the service at this URL. An answer that is not complete within `timeout`
    /// is an unknown outcome.
    ///
    /// # Errors
    /// If the URL cannot be a base, or the client cannot be created.
    pub fn new(url: &Url, timeout: Duration) -> anyhow::Result<Self> {
        let at = |path: &str| {
            let mut url = url.clone();
            let segments = url.path_segments_mut();
            segments
                .map_err(|()| anyhow::anyhow!("the URL of the payment service cannot have a path"))?
                .pop_if_empty()
                .push(path);
            anyhow::Ok(url)
        };
        Ok(Self {
            http: Client::builder()
                .timeout(timeout)
                .redirect(Policy::none())
                .no_proxy()
                .build()?,
            charges: at("charges")?,
            refunds: at("refunds")?,
        })
    }

    // ANCHOR: charge
    /// Asks for the price of a ticket. The same reservation is charged once, however often this is
    /// called.
    ///
    /// # Errors
    /// [`UnknownOutcome`]: the money may be taken, or not, or later.
    pub async fn charge(&self, reservation: Uuid, buyer: BuyerId) -> Result<Charge, UnknownOutcome> {
        let body = json!({"reservation": reservation, "buyer": buyer});
        let (code, status) = self.call(&self.charges, reservation, &body).await?;
        match status.as_str() {
            "approved" => Ok(Charge::Approved),
            "declined" => Ok(Charge::Declined),
            _ => Err(UnknownOutcome::NotUnderstood(code)),
        }
    }
    // ANCHOR_END: charge

    /// Returns what was charged for a reservation, if anything was. After it, no charge of this
    /// reservation takes money.
    ///
    /// # Errors
    /// [`UnknownOutcome`] also while the charge is still being processed.
    pub async fn refund(&self, reservation: Uuid) -> Result<(), UnknownOutcome> {
        let body = json!({"reservation": reservation});
        let (code, status) = self.call(&self.refunds, reservation, &body).await?;
        match status.as_str() {
            "refunded" => Ok(()),
            _ => Err(UnknownOutcome::NotUnderstood(code)),
        }
    }

    /// Returns the status of an answer that is 200 and complete.
    async fn call(
        &self,
        url: &Url,
        reservation: Uuid,
        body: &serde_json::Value,
    ) -> Result<(StatusCode, String), UnknownOutcome> {
        let request = self
            .http
            .post(url.clone())
            .header("idempotency-key", reservation.to_string())
            .header("content-type", "application/json")
            .body(body.to_string());
        let no_answer = |why: reqwest::Error| UnknownOutcome::NoAnswer(why.without_url());
        let mut answered = request.send().await.map_err(no_answer)?;
        let code = answered.status();
        let mut bytes = vec![];
        while let Some(chunk) = answered.chunk().await.map_err(no_answer)? {
            if bytes.len() + chunk.len() > MAX_ANSWER_BYTES {
                return Err(UnknownOutcome::TooLarge);
            }
            bytes.extend_from_slice(&chunk);
        }
        let not_understood = || UnknownOutcome::NotUnderstood(code);
        if code != StatusCode::OK {
            return Err(not_understood());
        }
        let answer: Answer = serde_json::from_slice(&bytes).map_err(|_| not_understood())?;
        Ok((code, answer.status))
    }
}
