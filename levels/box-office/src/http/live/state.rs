//! What the page shows of a sale, read from its rows.
//!
//! No reservation id is in it: whoever knows one may cancel the order.

use std::{cmp::Reverse, collections::BinaryHeap};

use serde::Serialize;
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use crate::{BuyerId, Database, ReserveError, SaleId, http::App};

/// The maximum number of tickets that are shown one by one.
const MOST_SEATS: usize = 2_000;

/// The maximum number of sales that are listed.
const LISTED_SALES: i64 = 20;

/// The whole state. Equal states are equal texts.
#[derive(Serialize)]
pub(super) struct State {
    sale: Option<Sale>,
    /// The sale that was asked for, if there is no such sale.
    unknown: Option<SaleId>,
    /// The newest sales.
    sales: Vec<ListedSale>,
    /// The tickets in the order of their numbers.
    seats: Vec<Option<Seat>>,
    /// The instances that have sold a ticket which is still taken.
    instances: Vec<Instance>,
    waiting: Waiting,
}

#[derive(Serialize)]
struct Sale {
    id: SaleId,
    name: String,
    capacity: i64,
    /// The sale's counter; nothing is derived from it.
    stock: i64,
    confirmed: i64,
    held: i64,
    /// Tickets that were held, and have come back.
    released: i64,
    /// Orders that were refused, on a level that stores these.
    refused: i64,
    /// Tickets that are taken by a buyer who has another one.
    duplicates: i64,
    /// From the first ticket that is taken to the last, by the database's clock.
    took_ms: Option<i64>,
}

#[derive(Serialize, sqlx::FromRow)]
struct ListedSale {
    id: SaleId,
    name: String,
}

#[derive(Serialize)]
struct Instance {
    name: String,
    tickets: i64,
}

/// Who waits, as far as this server knows.
#[derive(Serialize)]
struct Waiting {
    /// Requests in flight on this server.
    requests: usize,
    /// Accepted orders that nobody has decided, on any server. `None`: unknown, or decided at once.
    orders: Option<i64>,
}

/// One ticket: its last buyer, the index of the instance that served this buyer, and its status.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Seat(BuyerId, Option<usize>, &'static str);

const RELEASED: &str = "released";

impl Seat {
    fn is_taken(&self) -> bool {
        self.2 != RELEASED
    }
}

/// The reservations of a sale with this status, by one instance.
#[derive(sqlx::FromRow)]
struct Count {
    status: String,
    instance: Option<String>,
    reservations: i64,
    released: i64,
    first_us: Option<i64>,
    last_us: Option<i64>,
}

impl Count {
    fn is_taken(&self) -> bool {
        ["held", "confirmed"].contains(&self.status.as_str())
    }
}

/// A reservation that has, or had, a ticket.
#[derive(sqlx::FromRow)]
struct Row {
    buyer_id: BuyerId,
    status: String,
    instance: Option<String>,
    taken_us: i64,
    released_us: Option<i64>,
}

/// A connection to the database, and the queries for the columns that its views have.
pub(super) struct Reader {
    connection: PgConnection,
    count: String,
    list: String,
}

impl Reader {
    /// Opens a connection.
    pub(super) async fn connect(database: &Database) -> Result<Self, ReserveError> {
        let mut connection = PgConnection::connect_with(&database.pool().connect_options()).await?;
        let columns: Vec<String> = sqlx::query_scalar(
            "select attname::text
               from pg_attribute
              where attrelid = 'reservation_now'::regclass
                and attnum > 0",
        )
        .fetch_all(&mut connection)
        .await?;
        let or_null = |name: &'static str, otherwise| match columns.iter().any(|column| column == name) {
            true => name,
            false => otherwise,
        };
        // Only the views of levels whose tickets can come back tell when one did.
        let released_at = or_null("released_at", "null::timestamptz");
        let instance = or_null("instance", "null::text");
        Ok(Self {
            connection,
            count: format!(
                "select status,
                        {instance} as instance,
                        count(*) as reservations,
                        count({released_at}) as released,
                        (extract(epoch from min(changed_at)) * 1000000)::bigint as first_us,
                        (extract(epoch from max(changed_at)) * 1000000)::bigint as last_us
                   from reservation_now
                  where sale_id = $1
                  group by 1, 2"
            ),
            list: format!(
                "select buyer_id, status, instance, taken_us, released_us
                   from (select id,
                                buyer_id,
                                status,
                                {instance} as instance,
                                (extract(epoch from changed_at) * 1000000)::bigint as taken_us,
                                (extract(epoch from {released_at}) * 1000000)::bigint as released_us
                           from reservation_now
                          where sale_id = $1
                            and (status in ('held', 'confirmed') or {released_at} is not null)
                          order by changed_at desc, id desc
                          limit $2) as latest
                  order by taken_us, id"
            ),
        })
    }

    pub(super) async fn close(self) {
        let _ = self.connection.close().await;
    }

    /// Reads one sale, `None` for the newest, in one snapshot.
    pub(super) async fn read(&mut self, wanted: Option<SaleId>, app: &App) -> Result<State, ReserveError> {
        let mut snapshot = self
            .connection
            .begin_with("begin isolation level repeatable read read only")
            .await?;
        let sales = sqlx::query_as("select sale_id as id, name from sale_now order by sale_id desc limit $1")
            .bind(LISTED_SALES)
            .fetch_all(&mut *snapshot)
            .await?;
        let found: Option<(SaleId, String, i64, i64)> = sqlx::query_as(
            "select sale_id, name, capacity, stock
               from sale_now
              where sale_id = coalesce($1, (select max(sale_id) from sale_now))",
        )
        .bind(wanted)
        .fetch_optional(&mut *snapshot)
        .await?;
        let mut state = State {
            sale: None,
            unknown: wanted.filter(|_| found.is_none()),
            sales,
            seats: vec![],
            instances: vec![],
            waiting: Waiting {
                requests: app.reservations.len(),
                orders: app.metrics.lag(),
            },
        };
        if let Some((id, name, capacity, stock)) = found {
            let counts: Vec<Count> = sqlx::query_as(AssertSqlSafe(self.count.as_str()))
                .bind(id)
                .fetch_all(&mut *snapshot)
                .await?;
            let rows: Vec<Row> = sqlx::query_as(AssertSqlSafe(self.list.as_str()))
                .bind(id)
                .bind(MOST_SEATS as i64)
                .fetch_all(&mut *snapshot)
                .await?;
            let duplicates = sqlx::query_scalar(
                "select count(*) - count(distinct buyer_id)
                   from reservation_now
                  where sale_id = $1
                    and status in ('held', 'confirmed')",
            )
            .bind(id)
            .fetch_one(&mut *snapshot)
            .await?;
            state.instances = instances(&counts);
            state.seats = seats(&rows, &state.instances, capacity);
            let of = |status: &str| -> i64 {
                let counts = counts.iter().filter(|count| count.status == status);
                counts.map(|count| count.reservations).sum()
            };
            state.sale = Some(Sale {
                id,
                name,
                capacity,
                stock,
                confirmed: of("confirmed"),
                held: of("held"),
                released: counts.iter().map(|count| count.released).sum(),
                refused: of("refused"),
                duplicates,
                took_ms: took_ms(&counts),
            });
        }
        snapshot.commit().await?;
        Ok(state)
    }
}

/// From the first ticket that is taken to the last.
fn took_ms(counts: &[Count]) -> Option<i64> {
    let taken = || counts.iter().filter(|count| count.is_taken());
    let first_us = taken().filter_map(|count| count.first_us).min()?;
    let last_us = taken().filter_map(|count| count.last_us).max()?;
    Some((last_us - first_us) / 1000)
}

/// The instances in the order of their names.
fn instances(counts: &[Count]) -> Vec<Instance> {
    let mut instances: Vec<Instance> = vec![];
    for count in counts.iter().filter(|count| count.is_taken()) {
        let Some(name) = count.instance.as_deref().filter(|name| !name.is_empty()) else {
            continue;
        };
        match instances.iter_mut().find(|instance| instance.name == name) {
            Some(instance) => instance.tickets += count.reservations,
            None => instances.push(Instance {
                name: name.to_owned(),
                tickets: count.reservations,
            }),
        }
    }
    instances.sort_by(|a, b| a.name.cmp(&b.name));
    instances
}

/// Gives each reservation a ticket: the lowest that is free when it is taken. The rows, in the order
/// in which they took one, have no numbers themselves.
///
/// As many tickets beyond the capacity are taken as there are reservations too many, and none that
/// two clocks a microsecond apart would suggest.
fn seats(rows: &[Row], instances: &[Instance], capacity: i64) -> Vec<Option<Seat>> {
    let mut seats: Vec<Seat> = vec![];
    let mut free = BinaryHeap::new();
    let mut comes_back = BinaryHeap::new();
    for row in rows {
        while let Some(&Reverse((at_us, number))) = comes_back.peek()
            && at_us <= row.taken_us
        {
            comes_back.pop();
            free.push(Reverse(number));
        }
        let by = instances
            .iter()
            .position(|instance| Some(&instance.name) == row.instance.as_ref());
        let status = match row.status.as_str() {
            "confirmed" => "confirmed",
            "held" => "held",
            _ => RELEASED,
        };
        let seat = Seat(row.buyer_id, by, status);
        let number = match free.pop() {
            Some(Reverse(number)) => {
                seats[number] = seat;
                number
            }
            None => {
                seats.push(seat);
                seats.len() - 1
            }
        };
        if let Some(released_us) = row.released_us {
            comes_back.push(Reverse((released_us, number)));
        }
    }

    let capacity = usize::try_from(capacity).unwrap_or(0);
    let within = seats.len().min(capacity);
    let (inside, beyond) = seats.split_at_mut(within);
    let room = inside.iter_mut().filter(|seat| !seat.is_taken());
    for (room, seat) in room.zip(beyond.iter_mut().filter(|seat| seat.is_taken())) {
        std::mem::swap(room, seat);
    }
    let (inside, beyond) = seats.split_at(within);
    let beyond = beyond.iter().filter(|seat| seat.is_taken());
    inside.iter().chain(beyond).cloned().map(Some).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(buyer_id: BuyerId, status: &str, taken_us: i64, released_us: Option<i64>) -> Row {
        Row {
            buyer_id,
            status: status.to_owned(),
            instance: Some("b".to_owned()),
            taken_us,
            released_us,
        }
    }

    fn shown(rows: &[Row], capacity: i64) -> Vec<(BuyerId, &'static str)> {
        let instances = ["a", "b"].map(|name| Instance {
            name: name.to_owned(),
            tickets: 1,
        });
        let seats = seats(rows, &instances, capacity);
        assert!(seats.iter().flatten().all(|seat| seat.1 == Some(1)));
        seats.into_iter().flatten().map(|seat| (seat.0, seat.2)).collect()
    }

    #[test]
    fn tickets_are_numbered_in_the_order_in_which_they_were_taken() {
        let rows = [
            row(7, "confirmed", 1, None),
            row(8, "held", 2, None),
            row(9, "confirmed", 3, None),
        ];
        assert_eq!(shown(&rows, 2), [(7, "confirmed"), (8, "held"), (9, "confirmed")]);
    }

    #[test]
    fn a_released_ticket_is_the_next_that_is_taken() {
        let rows = [
            row(7, "declined", 1, Some(5)),
            row(8, "confirmed", 2, None),
            row(9, "confirmed", 5, None),
            row(10, "cancelled", 6, Some(7)),
        ];
        assert_eq!(shown(&rows, 3), [(9, "confirmed"), (8, "confirmed"), (10, RELEASED)]);
    }

    #[test]
    fn a_ticket_beyond_the_capacity_is_one_too_many_now_and_not_by_the_clock() {
        // The release is dated after the reservation that it made possible.
        let rows = [row(7, "declined", 1, Some(6)), row(8, "confirmed", 5, None)];
        assert_eq!(shown(&rows, 1), [(8, "confirmed")]);
    }
}
