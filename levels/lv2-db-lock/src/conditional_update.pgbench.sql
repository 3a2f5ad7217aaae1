-- The statement of conditional_update.rs in one round trip: the upper bound that the database sets.
-- `buyer` counts up from a different offset in every client, so every buyer is unique.
\set buyer :buyer + 1
\set who :client_id * 1000000000 + :buyer

-- pgbench has no UUIDs: this one grows with the buyer, as a version 7 grows with time.
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
