//! What every byte of a tunnel passes on its way: base64 and the DATA record, both ways.

use std::hint::black_box;

use connect_spec::{
    encoding::{decode_base64, encode_base64},
    record::{Record, StreamId},
};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const SIZES: [usize; 4] = [64, 1024, 16 * 1024, 32 * 1024];

/// Bytes that are no run of one value.
fn payload(length: usize) -> Vec<u8> {
    (0..=u8::MAX).cycle().take(length).collect()
}

fn base64(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("base64");
    for size in SIZES {
        let raw = payload(size);
        let text = encode_base64(&raw);
        let mut decoded = Vec::new();
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::new("encode", size), |bencher| {
            bencher.iter(|| encode_base64(black_box(&raw)));
        });
        group.bench_function(BenchmarkId::new("decode", size), |bencher| {
            bencher.iter(|| decode_base64(black_box(text.as_bytes()), &mut decoded));
        });
        assert_eq!(decoded, raw);
    }
}

fn data_record(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("DATA record");
    for size in SIZES {
        let bytes = payload(size);
        let data = Record::Data { stream: StreamId::FIRST, offset: 1 << 40, bytes: &bytes };
        let mut record = Vec::new();
        data.encode(&mut record);
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::new("decode", size), |bencher| {
            bencher.iter(|| Record::decode(black_box(&record)).is_ok());
        });
        group.bench_function(BenchmarkId::new("encode", size), |bencher| {
            bencher.iter(|| {
                record.clear();
                black_box(&data).encode(&mut record);
            });
        });
        assert_eq!(Record::decode(&record), Ok(data));
    }
}

criterion_group!(codec, base64, data_record);
criterion_main!(codec);
