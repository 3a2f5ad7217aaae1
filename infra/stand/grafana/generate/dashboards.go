package main

import (
	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
)

// What every instance reads of the sale: one of them is enough.
const (
	confirmed = `max by (sale) (oversold_sale_reservations{status="confirmed"})`
	held      = `max by (sale) (oversold_sale_reservations{status="held"})`
	out       = `max by (sale) (sum by (sale, instance) (oversold_sale_reservations{status=~"confirmed|held"}))`
	stock     = `max by (sale) (oversold_sale_stock)`
	capacity  = `max by (sale) (oversold_sale_capacity)`
)

const reserve = `{method="POST", route="/api/sales/{id}/reservations"}`

func stepPercentile(p string) []query {
	return []query{{
		`histogram_quantile(` + p + `, sum by (le, step) (rate(oversold_step_seconds_bucket[$__rate_interval])))`,
		"{{step}}",
	}}
}

func dashboards() map[string]func() (dashboard.Dashboard, error) {
	type of = []cog.Builder[dashboard.Panel]
	on := func(uid, title, about string, panels of) func() (dashboard.Dashboard, error) {
		return func() (dashboard.Dashboard, error) { return build(uid, title, about, panels...) }
	}
	return map[string]func() (dashboard.Dashboard, error){
		"1-sale": on("sale", "1. The sale", "What has been sold, and whether it should have been.", of{
			panel{
				title: "Oversold by", number: true, redAt: 1, width: third,
				about:   "Tickets that are out beyond those that the sale has. Anything but 0 is a broken promise; LV.1 breaks it on purpose.",
				queries: []query{{`clamp_min(` + out + ` - ` + capacity + `, 0)`, "sale {{sale}}"}},
			}.build(),
			panel{
				title: "Confirmed", number: true, width: third,
				about:   "Reservations that hold a ticket for good.",
				queries: []query{{confirmed, "sale {{sale}}"}},
			}.build(),
			panel{
				title: "Stock", number: true, width: third,
				about:   "What the sale believes is left. In LV.1 it ends at 0, or below, as if nothing had happened.",
				queries: []query{{stock, "sale {{sale}}"}},
			}.build(),
			panel{
				title: "Tickets", width: half,
				about: "Stock falls as confirmed and held rise: together they are the capacity, at every moment. Where they cross it, a ticket was sold twice.",
				queries: []query{
					{stock, "stock, sale {{sale}}"}, {confirmed, "confirmed, sale {{sale}}"},
					{held, "held, sale {{sale}}"}, {capacity, "capacity, sale {{sale}}"},
				},
			}.build(),
			panel{
				title: "What buyers are told, per second", unit: "reqps", width: half, stacked: true,
				about:   "confirmed and accepted are tickets and orders; sold-out and already-reserved are refusals, and correct. overloaded, timed-out and backend-away say that the outcome is unknown.",
				queries: []query{{`sum by (answer) (rate(oversold_reservations_total[$__rate_interval]))`, "{{answer}}"}},
			}.build(),
			panel{
				title: "Who serves, per second", unit: "reqps", width: half, stacked: true,
				about:   "nginx sends a request to the instance with the fewest in flight. An instance that is slow gets fewer.",
				queries: []query{{`sum by (instance) (rate(oversold_reservations_total[$__rate_interval]))`, "{{instance}}"}},
			}.build(),
			panel{
				title: "Orders that ended without a ticket", width: half,
				about:   "LV.4 refuses after it has accepted: the refusal is the final state of the order. In the other levels it is the answer itself.",
				queries: []query{{`max by (sale, status) (oversold_sale_reservations{status!~"confirmed|held"})`, "{{status}}, sale {{sale}}"}},
			}.build(),
		}),
		"2-waiting": on("waiting", "2. Where buyers wait", "Why a strategy is slow: which of its steps a buyer spends the time in.", of{
			note("How to read this", "A reservation goes through the *steps* of its strategy; each is measured from the one before it, so a step that waits is long. Its end is a step, too.\n\n"+
				"- `transaction begun`: it waited for a connection of the **pool**.\n"+
				"- `stock read` in `pessimistic`: it waited for the **row lock**. `mutex taken`: for the mutex of this process. `lock taken` in LV.3: for the lock in **Redis**.\n"+
				"- `acknowledged` in LV.4: it waited for Kafka. The **queue** behind it is the last panel: the buyer has an answer by then, and no ticket yet.\n"+
				"- `outcome unknown`: it waited **in vain**, for a connection or a lock that it never got, or for a backend, and was answered 503. That is the time since the last step that it reached.\n"+
				"- `answered`: what came after the last step, mostly next to nothing.\n\n"+
				"`pessimistic` is slow because its row serves one transaction at a time. The few that have a connection wait in `stock read`; everybody else waits for the pool, in `transaction begun`, or in `outcome unknown` if that took too long. A larger pool only moves buyers from the second queue to the first."),
			panel{
				title: "Where the time goes", unit: "s", width: half, stacked: true,
				about:   "Seconds of waiting per second, by step: as many buyers are in that step on average. A wait counts when it ends. The tallest area is the bottleneck; outcome unknown is the time that they waited in vain.",
				queries: []query{{`sum by (step) (rate(oversold_step_seconds_sum[$__rate_interval]))`, "{{step}}"}},
			}.build(),
			panel{
				title: "Time to the answer", unit: "s", width: half,
				about:   "What the buyer waits for, as the instances measure it.",
				queries: percentiles(`oversold_http_request_duration_seconds_bucket` + reserve),
			}.build(),
			panel{title: "Each step, p50", unit: "s", width: third, about: "Half of the reservations took longer for this step.", queries: stepPercentile("0.50")}.build(),
			panel{title: "Each step, p95", unit: "s", width: third, about: "One in twenty took longer.", queries: stepPercentile("0.95")}.build(),
			panel{title: "Each step, p99", unit: "s", width: third, about: "One in a hundred took longer.", queries: stepPercentile("0.99")}.build(),
			panel{
				title: "The pool", width: half,
				about: "As many transactions run as there are connections; everybody else waits for one, or in LV.3 for the lock in Redis. LV.4 does not wait here: it has answered.",
				queries: []query{
					{`sum(oversold_pool_connections_in_use)`, "in use"}, {`sum(oversold_pool_connections_max)`, "the pools' size"},
					{`sum(oversold_pool_waiting)`, "buyers without one"},
				},
			}.build(),
			panel{
				title: "Retries, leases lost", width: half, unit: "ops",
				about: "optimistic tries again when another buyer was faster. A lease that is lost is one whose holder was paused for too long: fenced survives it.",
				queries: []query{
					{`sum(rate(oversold_retries_total[$__rate_interval]))`, "retries"}, {`sum(rate(oversold_leases_lost_total[$__rate_interval]))`, "leases lost"},
				},
			}.build(),
			panel{
				title: "The queue", unit: "s", width: full,
				about:   "How long an accepted order was in Kafka until a consumer had it. The buyer was answered long before.",
				queries: percentiles(`oversold_order_queue_seconds_bucket`),
			}.build(),
		}),
		"3-kafka": on("kafka", "3. Kafka", "The queue between the answer and the ticket (LV.4).", of{
			panel{
				title: "Lag by partition", width: half, stacked: true,
				about: "Orders that no consumer has committed. single-writer keeps a sale in one partition, so one sale is one line. It has to fall to 0 after the rush. With ORDER_PRIORITY the VIPs have a topic of their own.",
				queries: []query{
					{`max by (partition) (oversold_consumer_lag)`, "partition {{partition}}"},
					{`max by (partition) (oversold_vip_consumer_lag)`, "VIPs, partition {{partition}}"},
				},
			}.build(),
			panel{
				title: "Messages of a batch", width: half,
				about: "A batch is one transaction in single-writer: the longer the queue, the larger the batch, and the cheaper each order.",
				queries: []query{
					{`histogram_quantile(0.5, sum by (le) (rate(oversold_consumer_batch_messages_bucket[$__rate_interval])))`, "p50"},
					{`histogram_quantile(0.95, sum by (le) (rate(oversold_consumer_batch_messages_bucket[$__rate_interval])))`, "p95"},
				},
			}.build(),
			panel{
				title: "Dead letters", number: true, redAt: 1, width: third,
				about:   "Messages that could not be read as orders. Nobody decides them until somebody looks: oversold dead-letters.",
				queries: []query{{`sum(oversold_dead_letters_total)`, "dead letters"}},
			}.build(),
			panel{
				title: "Circuit breakers", number: true, redAt: 1, width: third,
				about:   "0 closed, 1 half-open, 2 open: the backend is not called.",
				queries: []query{{`max by (backend) (oversold_circuit_breaker_state)`, "{{backend}}"}},
			}.build(),
			panel{
				title: "Orders that expired", number: true, redAt: 1, width: third,
				about:   "They waited for longer than ORDER_TTL_MS, and took no ticket.",
				queries: []query{{`sum(oversold_orders_expired_total)`, "expired"}},
			}.build(),
			panel{
				title: "Messages received, per second", unit: "ops", width: half, stacked: true,
				about:   "By instance. Only the owner of the sale's partition is busy in single-writer.",
				queries: []query{{`sum by (instance) (rate(oversold_consumer_batch_messages_sum[$__rate_interval]))`, "{{instance}}"}},
			}.build(),
			panel{
				title: "Rebalances", width: half,
				about:   "Changes of the partitions of an instance. One instance that comes or goes is a few; a step every few seconds is a consumer that misses its heartbeats.",
				queries: []query{{`sum by (instance) (oversold_rebalances_total)`, "{{instance}}"}},
			}.build(),
		}),
		"4-saga": on("saga", "4. Hold, pay, confirm or release", "What became of the tickets that were held for their payment (LV.4, single-writer with PAYMENT_URL).", of{
			panel{
				title: "Outcome unknown for", number: true, redAt: 30, unit: "s", width: third,
				about:   "The age of the oldest payment of which nobody knows whether it was made. It is asked for again until the service answers.",
				queries: []query{{`max(oversold_payment_unknown_oldest_seconds)`, "the oldest"}},
			}.build(),
			panel{
				title: "Held", number: true, width: third,
				about:   "Tickets whose payment is under way. They come back if it fails, so sold out is not the last word yet.",
				queries: []query{{held, "sale {{sale}}"}},
			}.build(),
			panel{
				title: "Confirmed", number: true, width: third, about: "Tickets that are paid for.",
				queries: []query{{confirmed, "sale {{sale}}"}},
			}.build(),
			panel{
				title: "What the payment service answers, per second", unit: "ops", width: half, stacked: true,
				about:   "unknown is a call that timed out or failed: the money may have been taken.",
				queries: []query{{`sum by (outcome) (rate(oversold_payment_calls_total[$__rate_interval]))`, "{{outcome}}"}},
			}.build(),
			panel{
				title: "Charged and refunded", width: half,
				about:   "Calls by outcome since the instances started. A refund follows a charge that came too late.",
				queries: []query{{`sum by (outcome) (oversold_payment_calls_total)`, "{{outcome}}"}},
			}.build(),
			panel{
				title: "Tickets that came back", width: full,
				about:   "declined: not paid. expired: the hold ended first. cancelled: the buyer changed their mind. Each frees a ticket for another buyer.",
				queries: []query{{`max by (sale, status) (oversold_sale_reservations{status=~"declined|expired|cancelled"})`, "{{status}}, sale {{sale}}"}},
			}.build(),
		}),
		"5-machines": on("machines", "5. Machines", "What it runs on. On one machine everything shares its cores: a busy processor may be the load generator.", of{
			panel{
				title: "Instances up", number: true, width: third, about: "nginx leaves out an instance that it cannot reach.",
				queries: []query{{`sum(up{job="oversold"})`, "of three"}},
			}.build(),
			panel{
				title: "Reservations in flight", width: third, stacked: true,
				about:   "Those that have reached an instance and have no answer yet.",
				queries: []query{{`oversold_reservations_in_flight`, "{{instance}}"}},
			}.build(),
			panel{
				title: "Connections from nginx", width: third, stacked: true,
				about:   "Open connections by instance. nginx keeps idle ones for the next request.",
				queries: []query{{`oversold_connections_open`, "{{instance}}"}},
			}.build(),
			panel{
				title: "Processor", unit: "percentunit", width: third, stacked: true,
				about:   "Of all cores, by kind of work. iowait is time in which it waited for the disk and had nothing else to do.",
				queries: []query{{`sum by (mode) (rate(node_cpu_seconds_total{mode!="idle"}[$__rate_interval])) / scalar(count(node_cpu_seconds_total{mode="idle"}))`, "{{mode}}"}},
			}.build(),
			panel{
				title: "Memory", unit: "bytes", width: third, about: "Of the machine.",
				queries: []query{
					{`node_memory_MemTotal_bytes - node_memory_MemAvailable_bytes`, "in use"}, {`node_memory_MemTotal_bytes`, "there is"},
				},
			}.build(),
			panel{
				title: "Disks busy", unit: "percentunit", width: third,
				about:   "The share of the time in which a disk had something to do. A commit waits for one write: that bounds what one row can sell.",
				queries: []query{{`max by (device) (rate(node_disk_io_time_seconds_total[$__rate_interval]))`, "{{device}}"}},
			}.build(),
			panel{
				title: "Transactions of Postgres, per second", unit: "ops", width: third,
				about: "Commits, and what was rolled back: refusals, retries, deadlocks.",
				queries: []query{
					{`sum(rate(pg_stat_database_xact_commit[$__rate_interval]))`, "commits"},
					{`sum(rate(pg_stat_database_xact_rollback[$__rate_interval]))`, "rollbacks"},
					{`sum(rate(pg_stat_database_deadlocks[$__rate_interval]))`, "deadlocks"},
				},
			}.build(),
			panel{
				title: "Connections to Postgres", width: third, stacked: true,
				about:   "By what they do. active while nothing is computed is a wait, mostly for a row lock.",
				queries: []query{{`sum by (state) (pg_stat_activity_count)`, "{{state}}"}},
			}.build(),
			panel{
				title: "Commands of Redis, per second", unit: "ops", width: third,
				about:   "Locks are a few commands each; spin asks again and again (LV.3; LV.4's locked).",
				queries: []query{{`rate(redis_commands_processed_total[$__rate_interval])`, "commands"}},
			}.build(),
		}),
	}
}
