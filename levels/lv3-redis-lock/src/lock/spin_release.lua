-- Deletes the lock, if this owner still holds it. In two commands, GET and DEL, it would delete the next owner's lock
-- whenever the lease expires in between.
--   KEYS[1] the lock    ARGV[1] the owner
-- Returns 0, or -1 for a client that is not the owner.
if redis.call('get', KEYS[1]) ~= ARGV[1] then
    return -1
end
redis.call('del', KEYS[1])
return 0
