-- Tickets that are held until they are paid for, and may be released: PAYMENT_URL.

-- When the ticket was released. `changed_at` is when it was taken.
alter table reservation add column released_at timestamptz;

-- The status that an event reports. Null: the row's own, of an order whose first status is its last.
alter table outbox add column status text;

-- ANCHOR: saga
-- The saga of each ticket that was held: its state, and when its next step is due.
create table saga (
    reservation_id uuid        not null,
    sale_id        bigint      not null,
    buyer_id       bigint      not null,
    state          text        not null default 'held', -- then charging, then confirmed, or releasing and released
    ending         text,                                -- why it is released: declined, expired or cancelled
    refund_due     boolean     not null default false,  -- money may have been taken for a ticket that is released
    hold_until     timestamptz not null,
    attempts       integer     not null default 0,
    due_at         timestamptz                          -- null: nothing is left to do
                   default clock_timestamp()
);
-- ANCHOR_END: saga
create index saga_by_reservation on saga (reservation_id);
create index saga_due on saga (due_at) where due_at is not null;

create or replace view reservation_now as
    select id, sale_id, buyer_id, request_key, status, changed_at, reason, earlier, released_at
      from reservation;
