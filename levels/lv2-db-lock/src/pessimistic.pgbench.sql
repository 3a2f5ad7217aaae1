-- The statements of pessimistic.rs, in the same order and with a round trip each: the upper bound that the database sets.
-- `buyer` counts up from a different offset in every client, so every buyer is unique.
\set buyer :buyer + 1
\set who :client_id * 1000000000 + :buyer

begin;

select stock
  from sale
 where id = :sale
   for update
\gset

select id, buyer_id, request_key
  from reservation
 where sale_id = :sale
   and (buyer_id = :who or request_key = :who)
 order by request_key = :who desc
 limit 1;

\set left :stock - 1
update sale
   set stock = :left
 where id = :sale;

-- pgbench has no UUIDs: this one grows with the buyer, as a version 7 grows with time.
insert into reservation (id, sale_id, buyer_id, request_key)
values (lpad(:who::text, 32, '0')::uuid, :sale, :who, :who);

commit;
