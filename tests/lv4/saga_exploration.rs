//! Every order of what can happen to one held ticket, on the real rows: answers arrive, get lost and
//! come late, the hold ends, the buyer cancels, an instance dies, a command is delivered again.

use std::time::Duration;

use box_office::Database;
use harness::backends::TestEnvironment;
use lv4_kafka::saga::store::{self, Claimed, Due, State};
use uuid::Uuid;

use super::contract::strategy;

const SALE: i64 = 1;
const LEASE: Duration = Duration::from_secs(60);

/// What can happen next. Each may be impossible now, and then does nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Move {
    /// An instance claims the saga, unless it is finished: its time has come by then.
    Claim,
    /// The payment service serves the oldest call that it has not served yet.
    Serve,
    /// It serves the newest one: the calls before it are still on their way.
    Overtake,
    /// The instance learns the outcome of its oldest call, and stores it.
    Store,
    /// The instance dies with its oldest call: nobody learns the outcome. If it is not served yet, it is on
    /// its way all the same.
    Die,
    /// The time of the hold is over.
    Expire,
    /// The buyer cancels.
    Cancel,
    /// The command to release is delivered: the first time, or again.
    Deliver,
}

/// The moves of each exploration: those it begins with, and those that are made in every order after them,
/// as long as it is one that begins with a claim, or with what needs none.
const EXPLORATIONS: &[(&[Move], &[Move])] = {
    use Move::{Cancel, Claim, Deliver, Die, Expire, Overtake, Serve, Store};
    &[
        (&[], &[Claim, Claim, Serve, Store, Expire, Deliver]),
        (&[], &[Claim, Claim, Serve, Store, Cancel, Deliver]),
        (&[], &[Claim, Serve, Store, Expire, Cancel, Deliver]),
        (&[], &[Claim, Serve, Die, Expire, Cancel, Deliver]),
        // Of two instances one dies.
        (&[], &[Claim, Claim, Serve, Store, Die, Expire, Deliver]),
        (&[], &[Claim, Claim, Serve, Store, Die, Cancel, Deliver]),
        // The charge of an instance that has died is on its way, and another one asks for the refund.
        (
            &[Claim, Die, Cancel, Deliver, Claim],
            &[Overtake, Store, Serve, Claim, Deliver],
        ),
    ]
};

/// A call of the payment service.
struct Call {
    saga: Claimed,
    is_served: bool,
    /// The instance that made it has died.
    is_orphan: bool,
}

/// The money of one reservation, as the payment service has it.
#[derive(Default)]
struct Money {
    declines: bool,
    charges: u32,
    refunds: u32,
    is_closed: bool,
}

impl Money {
    fn serve(&mut self, saga: &Claimed) {
        match saga.state {
            State::Charging if self.charges == 0 && !self.is_closed && !self.declines => self.charges = 1,
            State::Released if saga.refund_due => {
                self.is_closed = true;
                self.refunds = self.charges;
            }
            _ => {}
        }
    }

    fn approves(&self) -> bool {
        self.charges == 1
    }
}

struct World<'a> {
    database: &'a Database,
    id: Uuid,
    calls: Vec<Call>,
    money: Money,
}

impl World<'_> {
    async fn take(&mut self, step: Move) -> anyhow::Result<()> {
        match step {
            Move::Claim => {
                sqlx::query(
                    "update saga set due_at = clock_timestamp() where reservation_id = $1 and due_at is not null",
                )
                .bind(self.id)
                .execute(self.database)
                .await?;
                for what in Due::ALL {
                    for saga in store::claim(self.database, what, 1, LEASE).await? {
                        self.calls.push(Call {
                            saga,
                            is_served: false,
                            is_orphan: false,
                        });
                    }
                }
            }
            Move::Serve | Move::Overtake => {
                let mut unserved = self.calls.iter_mut().filter(|call| !call.is_served);
                let call = match step {
                    Move::Overtake => unserved.next_back(),
                    _ => unserved.next(),
                };
                if let Some(call) = call {
                    call.is_served = true;
                    self.money.serve(&call.saga);
                }
            }
            Move::Store => {
                if let Some(oldest) = self.calls.iter().position(|call| !call.is_orphan) {
                    let call = self.calls.remove(oldest);
                    self.store(&call).await?;
                }
            }
            Move::Die => {
                if let Some(call) = self.calls.iter_mut().find(|call| !call.is_orphan) {
                    call.is_orphan = true;
                }
            }
            Move::Expire => {
                sqlx::query("update saga set hold_until = clock_timestamp() where reservation_id = $1")
                    .bind(self.id)
                    .execute(self.database)
                    .await?;
            }
            Move::Cancel => {
                store::cancel(self.database, self.id).await?;
            }
            Move::Deliver => {
                let mut tx = self.database.begin().await?;
                store::release(&mut tx, &[self.id]).await?;
                tx.commit().await?;
            }
        }
        Ok(())
    }

    async fn store(&mut self, call: &Call) -> anyhow::Result<()> {
        let mut tx = self.database.begin().await?;
        store::lock(&mut tx, &[self.id]).await?;
        let ids = [self.id];
        match (call.saga.state, call.is_served) {
            (State::Charging, false) => store::unanswered(&mut tx, &ids).await?,
            (State::Charging, true) if self.money.approves() => store::approved(&mut tx, &ids).await?,
            (State::Charging, true) => store::declined(&mut tx, &ids).await?,
            (State::Released, true) if call.saga.refund_due => store::wound_down(&mut tx, &ids, &ids, LEASE).await?,
            _ => store::wound_down(&mut tx, &ids, &[], LEASE).await?,
        }
        tx.commit().await?;
        Ok(())
    }

    /// Nothing happens any more but what the saga does by itself. Returns what is wrong then.
    async fn settle(&mut self) -> anyhow::Result<Vec<String>> {
        for _ in 0..3 {
            for step in [
                Move::Claim,
                Move::Serve,
                Move::Serve,
                Move::Store,
                Move::Store,
                Move::Deliver,
            ] {
                self.take(step).await?;
            }
        }
        let (state, open, status, stock, events): (String, bool, String, i64, i64) = sqlx::query_as(
            "select state, due_at is not null, status, stock, (select count(*) from outbox where reservation_id = $1)
               from saga
               join reservation on id = reservation_id
               join sale on sale.id = saga.sale_id
              where reservation_id = $1",
        )
        .bind(self.id)
        .fetch_one(self.database)
        .await?;
        let Money { charges, refunds, .. } = self.money;
        let is_confirmed = status == "confirmed";
        let mut wrong = vec![];
        if open || !["confirmed", "released"].contains(&state.as_str()) {
            wrong.push(format!("it is {state} in the end"));
        }
        if (state == "confirmed") != is_confirmed || (stock == 0) != is_confirmed || !(0..=1).contains(&stock) {
            wrong.push(format!("{state}, {status}, stock {stock}"));
        }
        if charges - refunds != u32::from(is_confirmed) {
            wrong.push(format!("{charges} charges, {refunds} refunds, and it is {status}"));
        }
        if events != 1 {
            wrong.push(format!("{events} events of its end"));
        }
        Ok(wrong)
    }
}

/// Whether something is made of a call before there is one: that does nothing, and is no order of its own.
fn comes_too_early(order: &[Move]) -> bool {
    let needs_a_call = |step: &Move| matches!(step, Move::Serve | Move::Overtake | Move::Store | Move::Die);
    order.iter().take_while(|step| **step != Move::Claim).any(needs_a_call)
}

/// All different orders of these moves.
fn orders(moves: &[Move]) -> Vec<Vec<Move>> {
    if moves.is_empty() {
        return vec![vec![]];
    }
    let mut all: Vec<Vec<Move>> = vec![];
    for (at, first) in moves.iter().enumerate() {
        if moves[..at].contains(first) {
            continue;
        }
        let mut rest = moves.to_vec();
        rest.remove(at);
        all.extend(orders(&rest).into_iter().map(|order| [vec![*first], order].concat()));
    }
    all
}

#[tokio::test]
async fn no_order_of_what_can_happen_leaves_a_held_ticket_or_unrefunded_money() -> anyhow::Result<()> {
    let strategy = strategy("single-writer");
    let environment = TestEnvironment::shared(strategy).await?;
    let database: Database = environment.database().pool(2).await?.into();
    let mut explored = 0;
    for (first, moves) in EXPLORATIONS {
        let orders = orders(moves).into_iter().map(|order| [*first, &order].concat());
        let orders = orders.filter(|order| !comes_too_early(order));
        for (order, declines) in orders.flat_map(|order| [(order.clone(), false), (order, true)]) {
            let id = Uuid::from_u128(explored + 1);
            // A sale of one ticket, which is held.
            sqlx::query(
                "with gone as (delete from saga), old as (delete from reservation), told as (delete from outbox),
                      sold as (insert into sale (id, name, capacity, stock) values ($2, '', 1, 0)
                                   on conflict (id) do update set stock = 0),
                      held as (insert into saga (reservation_id, sale_id, buyer_id, hold_until)
                               values ($1, $2, 1, clock_timestamp() + interval '1 hour'))
                 insert into reservation (id, sale_id, buyer_id, request_key, status) values ($1, $2, 1, 'a', 'held')",
            )
            .bind(id)
            .bind(SALE)
            .execute(&database)
            .await?;
            let mut world = World {
                database: &database,
                id,
                calls: vec![],
                money: Money {
                    declines,
                    ..Money::default()
                },
            };
            for &step in &order {
                world.take(step).await?;
            }
            let wrong = world.settle().await?;
            assert!(wrong.is_empty(), "after {order:?}, declines: {declines}: {wrong:?}");
            explored += 1;
        }
    }
    println!("{explored} orders explored");
    Ok(())
}
