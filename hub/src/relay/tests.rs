use std::future::pending;

use tokio::{
    io::{DuplexStream, duplex},
    sync::oneshot,
    task::JoinHandle,
};

use super::*;

// Spelled out once more: what the tests expect does not come from what they test.
const FIN: u8 = 0x80;
const MASKED: u8 = 0x80;
const CONTINUATION: u8 = 0x0;
const TEXT: u8 = 0x1;
const BINARY: u8 = 0x2;
const CLOSE: u8 = 0x8;
const PING: u8 = 0x9;
const PONG: u8 = 0xa;

const MASK: [u8; 4] = [0xa1, 0x02, 0xc3, 0x54];

/// A frame as an agent sends it.
fn masked(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = unmasked(first, payload);
    frame[1] |= MASKED;
    let head = frame.len() - payload.len();
    for (byte, mask) in frame[head..].iter_mut().zip(MASK.iter().cycle()) {
        *byte ^= mask;
    }
    frame.splice(head..head, MASK);
    frame
}

/// A frame as the hub sends it.
fn unmasked(first: u8, payload: &[u8]) -> Vec<u8> {
    let spelled = (payload.len() as u64).to_be_bytes();
    let length = match payload.len() {
        0..=125 => spelled[7..].to_vec(),
        126..=0xffff => [&[126], &spelled[6..]].concat(),
        _ => [&[127], &spelled[..]].concat(),
    };
    [&[first], length.as_slice(), payload].concat()
}

fn close_frame(code: u16) -> Vec<u8> {
    unmasked(FIN | CLOSE, &code.to_be_bytes())
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|i| u8::try_from(i % 251).unwrap()).collect()
}

#[track_caller]
fn check_translation(input: &[u8], chunk: usize, expected: Result<&[u8], u16>) {
    let mut translator = Translator::new(Encoding::Binary);
    let (mut pong, mut answer) = (None, None);
    let mut all = Vec::new();
    for part in input.chunks(chunk) {
        let mut buffer = vec![0; part.len() + SLACK_BYTES];
        let mut output = Output { buffer: &mut buffer, length: 0 };
        let step = translator.translate(part, &mut output, &mut pong, &mut answer);
        let length = output.length;
        all.extend_from_slice(&buffer[..length]);
        match step {
            Ok(Step::More) => {}
            Ok(Step::Closed) => break,
            Err(Violation(code)) => {
                assert_eq!(expected, Err(code));
                return;
            }
        }
    }
    assert_eq!(expected, Ok(all.as_slice()));
}

#[test]
fn frames_come_out_whole_however_they_arrive() {
    let mut input = Vec::new();
    let mut expected = Vec::new();
    for length in [0, 1, 3, 8, 125, 126, 127, 65_535, 65_536, MAX_DATA_FRAME_BYTES] {
        input.extend(masked(FIN | BINARY, &bytes(length)));
        expected.extend(unmasked(FIN | BINARY, &bytes(length)));
        // Neither ends up at the other agent.
        input.extend(masked(FIN | PING, b"are you there"));
        input.extend(masked(FIN | PONG, b""));
    }
    for chunk in [1, 2, 5, 13, 4096, 65_536, input.len()] {
        check_translation(&input, chunk, Ok(&expected));
    }
}

#[test]
fn fragments_pass_and_their_sum_is_limited() {
    let half = bytes(MAX_DATA_FRAME_BYTES / 2);
    let first = masked(BINARY, &half);
    let last = masked(FIN | CONTINUATION, &half);
    let expected = [unmasked(BINARY, &half), unmasked(FIN | CONTINUATION, &half)].concat();
    check_translation(&[first.clone(), last].concat(), 4096, Ok(&expected));
    let one_more = masked(FIN | CONTINUATION, &bytes(half.len() + 1));
    check_translation(&[first.clone(), one_more].concat(), 4096, Err(close::TOO_BIG));
    check_translation(&[first.clone(), first].concat(), 4096, Err(close::PROTOCOL));
    check_translation(&masked(FIN | CONTINUATION, b"x"), 4096, Err(close::PROTOCOL));
}

#[test]
fn frames_against_the_protocol_are_refused() {
    let payload = bytes(10);
    let mut huge = masked(FIN | BINARY, &payload);
    huge.splice(1..2, [MASKED | 127, 0x80, 0, 0, 0, 0, 0, 0, 0]);
    let mut long_spelling = masked(FIN | BINARY, &payload);
    long_spelling.splice(1..2, [MASKED | 126, 0, 10]);
    let cases = [
        (unmasked(FIN | BINARY, &payload), close::PROTOCOL),
        (masked(FIN | 0x40 | BINARY, &payload), close::PROTOCOL),
        (masked(FIN | 0x10 | BINARY, &payload), close::PROTOCOL),
        (masked(FIN | 0x3, &payload), close::PROTOCOL),
        (masked(FIN | 0xb, &payload), close::PROTOCOL),
        (masked(FIN | TEXT, &payload), close::UNSUPPORTED),
        (masked(FIN | BINARY, &bytes(MAX_DATA_FRAME_BYTES + 1)), close::TOO_BIG),
        (huge, close::TOO_BIG),
        (long_spelling, close::PROTOCOL),
        (masked(PING, b"in parts"), close::PROTOCOL),
        (masked(FIN | PING, &bytes(126)), close::PROTOCOL),
        (masked(FIN | CLOSE, b"x"), close::PROTOCOL),
    ];
    for (input, code) in cases {
        for chunk in [1, 4096] {
            check_translation(&input, chunk, Err(code));
        }
    }
}

/// Two agents at the ends of a relay.
struct Tunnel {
    reacher: DuplexStream,
    exposer: DuplexStream,
    stop: oneshot::Sender<u16>,
    relay: JoinHandle<Ended>,
    meter: Arc<Meter>,
}

fn tunnel(encoding: Encoding, pipe_bytes: usize) -> Tunnel {
    let (reacher, near) = duplex(pipe_bytes);
    let (exposer, far) = duplex(pipe_bytes);
    let (stop, stopped) = oneshot::channel();
    let stopped = async move {
        match stopped.await {
            Ok(code) => code,
            Err(_) => pending().await,
        }
    };
    let near = Leg { io: near, early: Bytes::new() };
    let far = Leg { io: far, early: Bytes::new() };
    let meter = Arc::new(Meter::default());
    let counted = Arc::clone(&meter);
    let relay = tokio::spawn(async move { relay(near, far, encoding, &counted, stopped).await });
    Tunnel { reacher, exposer, stop, relay, meter }
}

async fn expect(socket: &mut DuplexStream, frame: &[u8]) {
    let mut found = vec![0; frame.len()];
    socket.read_exact(&mut found).await.unwrap();
    assert!(
        found == frame,
        "expected a frame of {} bytes that begins {:x?}",
        frame.len(),
        &frame[..2]
    );
}

async fn expect_end(mut socket: DuplexStream) {
    let mut rest = Vec::new();
    socket.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"");
}

#[tokio::test]
async fn a_close_that_went_through_is_the_last_frame() {
    // The exposer has taken a part of the reacher's close when the hub ends the tunnel.
    let mut tunnel = tunnel(Encoding::Binary, 2);
    let payload = [&close::NORMAL.to_be_bytes()[..], b"enough of it"].concat();
    let (sent, expected) = (masked(FIN | CLOSE, &payload), unmasked(FIN | CLOSE, &payload));
    let mut got = vec![0; 2];
    let (wrote, read) =
        tokio::join!(tunnel.reacher.write_all(&sent), tunnel.exposer.read_exact(&mut got));
    wrote.and(read.map(drop)).unwrap();
    tunnel.stop.send(close::CUT).unwrap();
    tunnel.exposer.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, expected);
    drop(tunnel.reacher);
    assert_eq!(tunnel.relay.await.unwrap(), Ended::Stopped(close::CUT));
}

#[tokio::test]
async fn a_tunnel_carries_both_ways_and_closes_cleanly() {
    let mut tunnel = tunnel(Encoding::Base64, 1 << 20);
    let up = bytes(100_000);
    tunnel.reacher.write_all(&masked(FIN | TEXT, &up)).await.unwrap();
    tunnel.exposer.write_all(&masked(FIN | TEXT, b"down")).await.unwrap();
    expect(&mut tunnel.exposer, &unmasked(FIN | TEXT, &up)).await;
    expect(&mut tunnel.reacher, &unmasked(FIN | TEXT, b"down")).await;

    tunnel.reacher.write_all(&masked(FIN | CLOSE, &close::NORMAL.to_be_bytes())).await.unwrap();
    expect(&mut tunnel.exposer, &close_frame(close::NORMAL)).await;
    // What the other end still had to say arrives before its close.
    tunnel.exposer.write_all(&masked(FIN | TEXT, b"last words")).await.unwrap();
    tunnel.exposer.write_all(&masked(FIN | CLOSE, &close::NORMAL.to_be_bytes())).await.unwrap();
    expect(&mut tunnel.reacher, &unmasked(FIN | TEXT, b"last words")).await;
    expect(&mut tunnel.reacher, &close_frame(close::NORMAL)).await;
    tokio::join!(expect_end(tunnel.reacher), expect_end(tunnel.exposer));
    assert_eq!(tunnel.relay.await.unwrap(), Ended::Closed(Side::Reacher));
    assert_eq!(tunnel.meter.sent.by(Side::Reacher), 100_000);
    assert_eq!(tunnel.meter.sent.by(Side::Exposer), 14);
}

#[tokio::test]
async fn nothing_is_lost_in_the_narrowest_pipe() {
    for pipe_bytes in [1, 7, 1000] {
        let Tunnel { mut reacher, mut exposer, stop: _stop, relay: _relay, meter: _ } =
            tunnel(Encoding::Binary, pipe_bytes);
        let writer = async {
            for length in [0, 1, 126, 3000] {
                reacher.write_all(&masked(FIN | BINARY, &bytes(length))).await.unwrap();
            }
        };
        let reader = async {
            for length in [0, 1, 126, 3000] {
                expect(&mut exposer, &unmasked(FIN | BINARY, &bytes(length))).await;
            }
        };
        tokio::join!(writer, reader);
    }
}

/// What the hub takes from a sender whose receiver stopped, the bytes in both pipes aside.
async fn held_for(from: &mut DuplexStream, frame: &[u8], pipe_bytes: usize) -> usize {
    let mut taken = 0;
    // The clock stands still while anything moves, so the wait is over only when nothing does.
    while let Ok(written) =
        timeout(TUNNEL_IDLE_CHECK / 20, from.write(&frame[taken % frame.len()..])).await
    {
        taken += written.unwrap();
        assert!(taken < 100 * RELAY_BUFFER_BYTES, "the relay takes without end");
    }
    taken.saturating_sub(2 * pipe_bytes)
}

#[tokio::test(start_paused = true)]
async fn a_receiver_that_stops_costs_the_hub_one_buffer_in_its_direction() {
    const PIPE: usize = 1024;
    let mut tunnel = tunnel(Encoding::Binary, PIPE);
    let payload = bytes(10_000);
    let up = held_for(&mut tunnel.reacher, &masked(FIN | BINARY, &payload), PIPE).await;
    let down = held_for(&mut tunnel.exposer, &masked(FIN | BINARY, &payload), PIPE).await;
    for held in [up, down] {
        assert!((1..=RELAY_BUFFER_BYTES + PIPE).contains(&held), "{held} bytes are held");
    }
    drop(tunnel.stop);
}

#[tokio::test]
async fn a_ping_is_answered_to_its_sender_between_frames() {
    let mut tunnel = tunnel(Encoding::Binary, 1 << 20);
    tunnel.reacher.write_all(&masked(FIN | PING, b"one")).await.unwrap();
    expect(&mut tunnel.reacher, &unmasked(FIN | PONG, b"one")).await;

    // In the middle of a frame to the reacher there is no place for its pong.
    let frame = masked(FIN | BINARY, &bytes(1000));
    let whole = unmasked(FIN | BINARY, &bytes(1000));
    tunnel.exposer.write_all(&frame[..500]).await.unwrap();
    expect(&mut tunnel.reacher, &whole[..496]).await;
    tunnel.reacher.write_all(&masked(FIN | PING, b"two")).await.unwrap();
    tunnel.reacher.write_all(&masked(FIN | BINARY, b"after")).await.unwrap();
    expect(&mut tunnel.exposer, &unmasked(FIN | BINARY, b"after")).await;
    tunnel.exposer.write_all(&frame[500..]).await.unwrap();
    expect(&mut tunnel.reacher, &whole[496..]).await;
    expect(&mut tunnel.reacher, &unmasked(FIN | PONG, b"two")).await;

    tunnel.exposer.write_all(&masked(FIN | PING, b"three")).await.unwrap();
    expect(&mut tunnel.exposer, &unmasked(FIN | PONG, b"three")).await;
}

#[tokio::test]
async fn garbage_closes_both_ends_with_their_codes() {
    let mut tunnel = tunnel(Encoding::Binary, 1 << 20);
    tunnel.exposer.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    expect(&mut tunnel.exposer, &close_frame(close::PROTOCOL)).await;
    expect(&mut tunnel.reacher, &close_frame(close::PEER_GONE)).await;
    tokio::join!(expect_end(tunnel.reacher), expect_end(tunnel.exposer));
    let ended = tunnel.relay.await.unwrap();
    assert_eq!(ended, Ended::Violated(Side::Exposer, close::PROTOCOL));
}

#[tokio::test]
async fn an_end_that_vanishes_is_reported_to_the_other() {
    let mut tunnel = tunnel(Encoding::Binary, 1 << 20);
    tunnel.reacher.write_all(&masked(FIN | BINARY, b"last words")).await.unwrap();
    drop(tunnel.reacher);
    expect(&mut tunnel.exposer, &unmasked(FIN | BINARY, b"last words")).await;
    expect(&mut tunnel.exposer, &close_frame(close::PEER_GONE)).await;
    expect_end(tunnel.exposer).await;
    assert_eq!(tunnel.relay.await.unwrap(), Ended::Vanished(Side::Reacher));
}

#[tokio::test]
async fn what_waits_for_a_slow_end_is_counted() {
    let mut tunnel = tunnel(Encoding::Binary, 1024);
    let payload = bytes(20_000);
    let frame = masked(FIN | BINARY, &payload);
    let (mut reading, mut writing) = tokio::io::split(tunnel.reacher);
    let written = tokio::spawn(async move { writing.write_all(&frame).await });
    // The first bytes are through, and the exposer takes no more.
    let mut first = [0];
    tunnel.exposer.read_exact(&mut first).await.unwrap();
    while tunnel.meter.held.load(Ordering::Relaxed) == 0 {
        tokio::task::yield_now().await;
    }
    assert_eq!(tunnel.meter.held.load(Ordering::Relaxed), RELAY_BUFFER_BYTES);
    expect(&mut tunnel.exposer, &unmasked(FIN | BINARY, &payload)[1..]).await;
    written.await.unwrap().unwrap();
    assert_eq!(tunnel.meter.held.load(Ordering::Relaxed), 0);
    tunnel.relay.abort();
    let _ = reading.read(&mut first).await;
}

#[tokio::test]
async fn half_a_frame_is_never_completed_by_the_hub() {
    let mut tunnel = tunnel(Encoding::Binary, 1 << 20);
    let frame = masked(FIN | BINARY, &bytes(100));
    tunnel.reacher.write_all(&frame[..50]).await.unwrap();
    drop(tunnel.reacher);
    expect(&mut tunnel.exposer, &unmasked(FIN | BINARY, &bytes(100))[..46]).await;
    expect_end(tunnel.exposer).await;
}

#[tokio::test]
async fn the_hub_can_end_a_tunnel() {
    let mut tunnel = tunnel(Encoding::Binary, 1 << 20);
    tunnel.stop.send(close::RESTARTING).unwrap();
    expect(&mut tunnel.reacher, &close_frame(close::RESTARTING)).await;
    expect(&mut tunnel.exposer, &close_frame(close::RESTARTING)).await;
    tokio::join!(expect_end(tunnel.reacher), expect_end(tunnel.exposer));
    assert_eq!(tunnel.relay.await.unwrap(), Ended::Stopped(close::RESTARTING));
}

#[tokio::test(start_paused = true)]
async fn a_silent_tunnel_ends_and_a_pinging_one_does_not() {
    let mut tunnel = tunnel(Encoding::Binary, 1 << 20);
    for _ in 0..20 {
        tokio::time::sleep(connect_spec::limits::KEEPALIVE).await;
        tunnel.reacher.write_all(&masked(FIN | PING, b"")).await.unwrap();
        expect(&mut tunnel.reacher, &unmasked(FIN | PONG, b"")).await;
    }
    let silent_since = tokio::time::Instant::now();
    expect(&mut tunnel.reacher, &close_frame(close::TIMEOUT)).await;
    assert!(silent_since.elapsed() >= 3 * TUNNEL_IDLE_CHECK);
    assert!(silent_since.elapsed() <= 4 * TUNNEL_IDLE_CHECK);
    drop((tunnel.reacher, tunnel.exposer));
    assert_eq!(tunnel.relay.await.unwrap(), Ended::Idle);
}

#[tokio::test]
async fn bytes_that_came_with_the_upgrade_go_first() {
    let (_reacher, near) = duplex(1024);
    let (mut exposer, far) = duplex(1024);
    let early = masked(FIN | BINARY, b"early").into();
    let relay = tokio::spawn(async move {
        let (near, far) = (Leg { io: near, early }, Leg { io: far, early: Bytes::new() });
        relay(near, far, Encoding::Binary, &Arc::default(), pending()).await
    });
    expect(&mut exposer, &unmasked(FIN | BINARY, b"early")).await;
    relay.abort();
}
