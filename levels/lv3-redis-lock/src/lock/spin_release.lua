-- Deletes the lock, if it is still this owner's. Looking and deleting in two commands would delete the next owner's lock whenever the lease
-- ends in between.
--   KEYS[1] the lock    ARGV[1] the owner
-- Answers 0, or -1 for somebody who is not the owner.
if redis.call('get', KEYS[1]) ~= ARGV[1] then
    return -1
end
redis.call('del', KEYS[1])
return 0
