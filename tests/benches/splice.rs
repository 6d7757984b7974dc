//! A TCP connection through everything: splice, channel, sealing, the relay, and all of it back.
//!
//! What splices is private to the agent, and has no meaning without a tunnel under it. So this is the
//! real thing, as users run it: two agents and a hub, one connection whose messages come back.

use connect_tests::{home::Pair, hub::Hub, load::Target};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

fn splice(criterion: &mut Criterion) {
    let hub = Hub::start(&["--log", "info"]);
    let target = Target::start().expect("a free port");
    for encoding in ["base64", "binary"] {
        let pair = Pair::start_logging(&hub, "info", &["--encoding", encoding]);
        let reached = pair.carry(target.address(), "target");
        let mut group = criterion.benchmark_group(format!("splice/{encoding}"));
        for size in [64, 16 * 1024, 128 * 1024] {
            let mut echo = target.echo(reached, size).expect("it is reached");
            // There and back.
            group.throughput(Throughput::Bytes(2 * u64::from(size)));
            group.bench_function(BenchmarkId::new("round trip", size), |bencher| {
                bencher.iter(|| echo.round_trip().expect("the tunnel is up"));
            });
        }
    }
}

criterion_group!(benches, splice);
criterion_main!(benches);
