-- Takes the lock and hands out a token greater than all before it, or says how long the lock will stay taken at most.
--   KEYS[1] the lock    KEYS[2] the last token    ARGV[1] the owner    ARGV[2] the lease in milliseconds    ARGV[3] the hold
-- Answers {1, how often it is held, token}, or {0, milliseconds, 0}.
local own = redis.call('hget', KEYS[1], 'owner') == ARGV[1]
if not own and redis.call('exists', KEYS[1]) == 1 then
    return { 0, redis.call('pttl', KEYS[1]), 0 }
end
local token = tonumber(redis.call('get', KEYS[2]) or '0')
-- Taken again by its owner, the token stays, unless it was lost.
if not own or token == 0 then
    -- A counter alone would begin again at 1 after a restart that lost it. The clock in microseconds does not, and no lock is taken a
    -- million times a second, so the counter never runs ahead of it.
    local time = redis.call('time')
    local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
    token = math.max(now, token + 1)
    -- For a day: names that nobody uses any more, made-up ones among them, must not stay for ever. After it the clock alone is enough.
    redis.call('set', KEYS[2], string.format('%.0f', token), 'EX', 86400)
end
redis.call('hset', KEYS[1], 'owner', ARGV[1], ARGV[3], 1)
redis.call('pexpire', KEYS[1], ARGV[2])
return { 1, redis.call('hlen', KEYS[1]) - 1, token }
