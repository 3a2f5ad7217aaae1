-- Writes what an acquisition writes, and deletes it: fails wherever an acquisition or a release would, on a replica and
-- without memory, too.
--   KEYS[1] a key of no lock
redis.call('hset', KEYS[1], 'owner', '')
redis.call('pexpire', KEYS[1], 1000)
redis.call('hdel', KEYS[1], 'owner')
redis.call('del', KEYS[1])
return 1
