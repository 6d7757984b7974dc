//! What every byte of a tunnel passes on its way: base64, the DATA record, and masks.

use std::hint::black_box;

use connect_spec::{
    encoding::{decode_base64, encode_base64},
    frame,
    record::{Record, StreamId},
};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const SIZES: [usize; 4] = [64, 1024, 16 * 1024, 32 * 1024];

/// Bytes that are no run of one value.
fn payload(length: usize) -> Vec<u8> {
    (0..=u8::MAX).cycle().take(length).collect()
}

fn base64(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("base64");
    for size in SIZES {
        let raw = payload(size);
        let mut text = Vec::new();
        encode_base64(&raw, &mut text);
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::new("decode", size), |bencher| {
            // Decoding is in place and uses the text up.
            bencher.iter_batched_ref(
                || text.clone(),
                |text| decode_base64(black_box(text)).map(|record| record.len()),
                BatchSize::SmallInput,
            );
        });
        group.bench_function(BenchmarkId::new("encode", size), |bencher| {
            bencher.iter(|| {
                text.clear();
                encode_base64(black_box(&raw), &mut text);
            });
        });
        assert_eq!(decode_base64(&mut text).as_deref(), Ok(raw.as_slice()));
    }
}

fn mask(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("mask");
    for size in SIZES {
        let mut bytes = payload(size);
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter(|| frame::mask(black_box(&mut bytes), [1, 2, 3, 4]));
        });
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

criterion_group!(codec, base64, data_record, mask);
criterion_main!(codec);
