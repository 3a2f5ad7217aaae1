-- The instance that wrote the row, for the live page: its name is the second word of the `application_name` of its connections.
-- No strategy names this column. Rows from before it have none.
alter table reservation add column instance text;
alter table reservation alter column instance set default split_part(current_setting('application_name'), ' ', 2);
create or replace view reservation_now as
    select id, sale_id, buyer_id, request_key, status, changed_at, instance from reservation;
