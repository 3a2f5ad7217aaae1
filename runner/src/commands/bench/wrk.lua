-- Every request is another buyer's, under a key of its own. Arguments: the sale's path, the first buyer.
local path, buyer

function init(arguments)
  path = arguments[1]
  buyer = tonumber(arguments[2])
  head = "POST " .. path .. " HTTP/1.1\r\nHost: " .. wrk.host .. "\r\nContent-Type: application/json\r\n"
end

-- Written out, as wrk.format is the dearest part of a request.
function request()
  buyer = buyer + 1
  local body = string.format('{"buyer_id":%d}', buyer)
  return head .. "Idempotency-Key: " .. buyer .. "\r\nContent-Length: " .. #body .. "\r\n\r\n" .. body
end

-- The last line of the output is for the program that started this.
function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '{"answers":%d,"took_us":%d,"refused":%d,"cut_off":%d,"p50_us":%d,"p95_us":%d,"p99_us":%d,"max_us":%d}\n',
    summary.requests, summary.duration, errors.status, errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50), latency:percentile(95), latency:percentile(99), latency.max))
end
