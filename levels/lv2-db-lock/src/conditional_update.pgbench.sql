-- The statement of conditional_update.rs, in one round trip: what the database itself makes of it.
-- `buyer` counts up from an offset of its own in every client, so no buyer comes twice.
\set buyer :buyer + 1
\set who :client_id * 1000000000 + :buyer

-- pgbench has no UUIDs: this one grows with the buyers, as a version 7 does with the time.
with taken as (
       update sale
          set stock = stock - 1
        where id = :sale
          and stock > 0
    returning id
 )
 insert into reservation (id, sale_id, buyer_id, request_key)
    select lpad(:who::text, 32, '0')::uuid, id, :who, :who
      from taken
 returning id;
