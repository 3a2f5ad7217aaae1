//! The HTTP contract that all levels share, tested on a level's own server over real sockets.

use anyhow::{Context, ensure};
use box_office::{Level, ProblemKind, SaleId, Strategy, api};
use hyper::{StatusCode, header};
use uuid::Uuid;

use crate::{
    backends::TestEnvironment,
    rush::{Program, SALE},
    test_server::TestServer,
};

/// Checks the contract on a server of this strategy.
///
/// # Errors
/// Names the first deviation, or says why the server did not start or stop.
pub async fn holds(program: &Program, level: &Level, strategy: &Strategy) -> anyhow::Result<()> {
    let environment = TestEnvironment::shared(strategy).await?;
    let server = TestServer::start(&environment, program, level, strategy).await?;
    sells_refuses_and_repeats(&server).await?;
    refuses_bad_input(&server).await?;
    let sale = server.sale(SALE).await?;
    ensure!((sale.stock, sale.reserved) == (0, 2), "bad input sold something");
    server.stop().await
}

/// Checks what the contract requires of confirmations, refusals and repeats, at once or as the
/// final state of an accepted order.
///
/// # Errors
/// Names the first deviation.
async fn sells_refuses_and_repeats(server: &TestServer) -> anyhow::Result<()> {
    use ProblemKind::{
        AlreadyReserved, KeyOfAnotherBuyer, SaleDiffers, SoldOut, Unauthorized, UnknownReservation, UnknownSale,
    };

    let token = server.admin_token();
    server.open_sale(SALE, 2, None).await?.is(Unauthorized)?;
    server.open_sale(SALE, 2, Some("wrong")).await?.is(Unauthorized)?;
    server.get(&format!("/api/sales/{SALE}")).await?.is(UnknownSale)?;
    ensure!(server.open_sale(SALE, 2, Some(token)).await?.status == StatusCode::CREATED);
    ensure!(server.open_sale(SALE, 2, Some(token)).await?.status == StatusCode::OK);
    server.open_sale(SALE, 3, Some(token)).await?.is(SaleDiffers)?;

    let first = server.reserve(SALE, 1, Some("a")).await?;
    let location = first
        .headers
        .get(header::LOCATION)
        .context("201 and 202 say where the reservation is")?
        .to_str()?;
    let reservation = server.expect_confirmed(&first).await?;
    ensure!((reservation.sale_id, reservation.buyer_id) == (Some(SALE), Some(1)));
    ensure!(server.get(location).await?.json::<api::Reservation>()? == reservation);

    let again = server.reserve(SALE, 1, Some("a")).await?;
    ensure!(
        again.status == first.status && again.body == first.body,
        "a repeat answers as the first did"
    );
    ensure!(server.expect_confirmed(&again).await? == reservation);
    let other_key = server.reserve(SALE, 1, Some("b")).await?;
    let earlier = server.expect_refused(&other_key, AlreadyReserved).await?;
    ensure!(
        earlier == Some(reservation.id),
        "it names the reservation that is there, and not {earlier:?}"
    );
    let other_buyer = server.reserve(SALE, 2, Some("a")).await?;
    server.expect_refused(&other_buyer, KeyOfAnotherBuyer).await?;
    server.reserve(99, 1, None).await?.is(UnknownSale)?;
    sells_elsewhere(server, &reservation).await?;

    let without_key = server.reserve(SALE, 2, None).await?;
    server
        .expect_confirmed(&without_key)
        .await
        .context("a key is optional")?;
    let too_late = server.reserve(SALE, 3, None).await?;
    server.expect_refused(&too_late, SoldOut).await?;
    let repeat_after_the_end = server.reserve(SALE, 1, Some("a")).await?;
    ensure!(
        server.expect_confirmed(&repeat_after_the_end).await? == reservation,
        "sold out, and yet the same answer"
    );
    let sale = server.sale(SALE).await?;
    ensure!((sale.capacity, sale.stock, sale.reserved) == (2, 0, 2), "{sale:?}");

    server
        .get(&format!("/api/reservations/{}", Uuid::new_v4()))
        .await?
        .is(UnknownReservation)?;
    Ok(())
}

/// Checks that two open sales are independent, with the same buyers and keys.
async fn sells_elsewhere(server: &TestServer, here: &api::Reservation) -> anyhow::Result<()> {
    const ELSEWHERE: SaleId = 2;

    let before = server.sale(SALE).await?;
    server.create_sale(ELSEWHERE, 5).await?;
    let first = server
        .expect_confirmed(&server.reserve(ELSEWHERE, 1, Some("a")).await?)
        .await
        .context("a ticket for one sale is none for another")?;
    ensure!(first.id != here.id, "one reservation for two sales");
    let second = server
        .expect_confirmed(&server.reserve(ELSEWHERE, 2, Some("c")).await?)
        .await?;
    // For a buyer with a ticket, the error about the key takes precedence.
    let others_key = server.reserve(ELSEWHERE, 1, Some("c")).await?;
    server
        .expect_refused(&others_key, ProblemKind::KeyOfAnotherBuyer)
        .await?;
    ensure!(
        server
            .expect_confirmed(&server.reserve(ELSEWHERE, 2, Some("c")).await?)
            .await?
            == second
    );

    let sale = server.sale(ELSEWHERE).await?;
    ensure!((sale.capacity, sale.stock, sale.reserved) == (5, 3, 2), "{sale:?}");
    ensure!(server.sale(SALE).await? == before, "another sale has changed this one");
    Ok(())
}

/// Checks that every invalid request is answered with the right 4xx problem, and sells nothing.
///
/// # Errors
/// Names the first wrong answer.
async fn refuses_bad_input(server: &TestServer) -> anyhow::Result<()> {
    use ProblemKind::{
        BodyTooLarge, InvalidBody, MalformedBody, MalformedKey, MalformedPath, MethodNotAllowed, NotFound,
        UnknownReservation,
    };

    let deep = [b"[".repeat(10_000), b"]".repeat(10_000)].concat();
    for (body, problem, says) in [
        (b"{".to_vec(), MalformedBody, ""),
        (b"{\"buyer_id\": 1".to_vec(), MalformedBody, ""),
        (b"\"\xff\xfe\"".to_vec(), MalformedBody, ""),
        (vec![], MalformedBody, ""),
        (deep[..8_000].to_vec(), MalformedBody, ""),
        (b"{}".to_vec(), InvalidBody, "buyer_id"),
        (b"{\"buyer_id\": -1}".to_vec(), InvalidBody, "-1"),
        (b"{\"buyer_id\": \"1\"}".to_vec(), InvalidBody, "buyer_id"),
        (b"{\"buyer_id\": 1.5}".to_vec(), InvalidBody, "1.5"),
        (b"{\"buyer_id\": 1, \"vip\": true}".to_vec(), InvalidBody, "vip"),
        (b"{\"buyer_id\": 99999999999999999999}".to_vec(), InvalidBody, ""),
        (deep, BodyTooLarge, ""),
    ] {
        let start = String::from_utf8_lossy(&body[..body.len().min(40)]).into_owned();
        let answered = server.post(SALE, None, body).await.with_context(|| start.clone())?;
        let problem_body = answered.is(problem).with_context(|| start.clone())?;
        ensure!(
            problem_body.detail.contains(says),
            "{start} is answered with {:?}, which does not say {says:?}",
            problem_body.detail
        );
    }
    for key in ["with space", "", &"k".repeat(129)] {
        server
            .reserve(SALE, 1, Some(key))
            .await?
            .is(MalformedKey)
            .with_context(|| format!("key {key:?}"))?;
    }
    for (path, problem) in [
        ("/api/sales/one", MalformedPath),
        ("/api/sales/-1", MalformedPath),
        ("/api/sales/01", MalformedPath),
        ("/api/reservations/17", UnknownReservation),
        ("/api/nothing", NotFound),
        ("/api/sales/1/reservations", MethodNotAllowed),
    ] {
        server.get(path).await?.is(problem).with_context(|| path.to_owned())?;
    }
    for raw in [
        &b"\x00\xff\xfe garbage\r\n\r\n"[..],
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"POST / HTTP/9.9\r\n\r\n",
    ] {
        let answer = server.raw(raw).await?;
        ensure!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 4"),
            "{raw:?} is answered with {answer:?}"
        );
    }
    Ok(())
}
