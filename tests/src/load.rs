//! Load for measurements: a target that takes, gives or echoes bytes, and its clients, which go to it
//! `via` whatever leads there. Both ends are in this process, so bytes are counted and checked where
//! they arrive.
//!
//! Threads and plain sockets: simple, quick, and nothing of what is measured. A client says in 5 bytes
//! what it wants (`Wish`), and the target answers one byte, so a connection that is open is open all
//! the way.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Condvar, LazyLock, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crate::{PATIENCE, random};

/// Bytes of one read or write.
const CHUNK: usize = 128 * 1024;
/// The pattern begins anew after so many bytes: a prime, so that no record that is lost, repeated or
/// in another's place leaves it as it was.
const PERIOD: usize = 65_521;
/// What the target answers when a connection has come to it.
const READY: u8 = b'!';
/// A thousand connections are a thousand threads.
const STACK: usize = 128 * 1024;
/// Connections made in one go leave ports behind that cannot be used for a while.
const MOST_CONNECTIONS: usize = 4000;

/// Bytes of the pattern from this place in it, as many as one read or write has.
fn pattern(from: u64) -> &'static [u8] {
    static PATTERN: LazyLock<Vec<u8>> =
        LazyLock::new(|| random(PERIOD).into_iter().cycle().take(PERIOD + CHUNK).collect());
    let from = from % PERIOD as u64;
    &PATTERN[usize::try_from(from).expect("less than the period")..][..CHUNK]
}

/// What a client wants of the target.
#[derive(Debug, Clone, Copy)]
enum Wish {
    /// To send the pattern from this place on, until it has sent enough.
    Send(u32),
    /// To receive the pattern from this place on, until both have enough.
    Receive(u32),
    /// Each so many bytes back, until it ends.
    Echo(u32),
    /// Nothing.
    Rest,
}

impl Wish {
    fn encode(self) -> [u8; 5] {
        let (kind, number) = match self {
            Self::Send(from) => (1, from),
            Self::Receive(from) => (2, from),
            Self::Echo(size) => (3, size),
            Self::Rest => (4, 0),
        };
        let [a, b, c, d] = u32::to_be_bytes(number);
        [kind, a, b, c, d]
    }

    fn decode([kind, number @ ..]: [u8; 5]) -> io::Result<Self> {
        let number = u32::from_be_bytes(number);
        match kind {
            1 => Ok(Self::Send(number)),
            2 => Ok(Self::Receive(number)),
            3 => Ok(Self::Echo(number)),
            4 => Ok(Self::Rest),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// The way that bulk goes, as a client sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the client to the target.
    Up,
    /// From the target to the client.
    Down,
}

/// What both ends of some streams share.
#[derive(Debug, Default)]
struct Tally {
    /// Bytes that may be sent and not yet received.
    most_underway: u64,
    enough: AtomicBool,
    sent: AtomicU64,
    received: AtomicU64,
    corrupt: AtomicU64,
}

impl Tally {
    /// Sends the pattern until there is enough.
    fn send(&self, mut tcp: &TcpStream, from: u32) -> io::Result<()> {
        let mut at = u64::from(from);
        while !self.enough.load(Ordering::Relaxed) {
            let received = self.received.load(Ordering::Relaxed);
            if self.sent.load(Ordering::Relaxed).saturating_sub(received) >= self.most_underway {
                // Receivers do not stop to tell: they would be slower where there is no limit.
                thread::sleep(Duration::from_millis(1));
                continue;
            }
            let written = tcp.write(pattern(at))?;
            at += written as u64;
            self.sent.fetch_add(written as u64, Ordering::Relaxed);
        }
        tcp.shutdown(Shutdown::Write)
    }

    /// Receives to the end, and holds every byte against the pattern.
    fn receive(&self, mut tcp: &TcpStream, from: u32) -> io::Result<()> {
        let mut at = u64::from(from);
        let mut buffer = vec![0; CHUNK];
        loop {
            let length = tcp.read(&mut buffer)?;
            if length == 0 {
                return Ok(());
            }
            if buffer[..length] != pattern(at)[..length] {
                self.corrupt.fetch_add(1, Ordering::Relaxed);
            }
            at += length as u64;
            self.received.fetch_add(length as u64, Ordering::Relaxed);
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    /// Of the bulk that runs, or that ran last.
    tally: Mutex<Arc<Tally>>,
    open: Mutex<usize>,
    closed: Condvar,
}

/// A TCP service that serves load on a port of 127.0.0.1, as long as this process lives.
#[derive(Debug)]
pub struct Target {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Target {
    /// Starts it.
    ///
    /// # Errors
    /// When the system has no port.
    pub fn start() -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared::default());
        let served = shared.clone();
        thread::spawn(move || {
            for tcp in listener.incoming().flatten() {
                let shared = served.clone();
                *lock(&shared.open) += 1;
                let serving = spawn(move || {
                    // A client that goes away has what it wanted, or says that it has not.
                    let _ = serve(tcp, &shared);
                    *lock(&shared.open) -= 1;
                    shared.closed.notify_all();
                });
                // Nobody joins it: `wait_until_idle` counts.
                drop(serving);
            }
        });
        Ok(Self { address, shared })
    }

    /// Where it listens: `via` for the direct way.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits until every connection has ended at the target too.
    ///
    /// # Errors
    /// When that does not come.
    pub fn wait_until_idle(&self) -> io::Result<()> {
        let open = lock(&self.shared.open);
        let (open, _) = self
            .shared
            .closed
            .wait_timeout_while(open, PATIENCE, |open| *open > 0)
            .unwrap_or_else(PoisonError::into_inner);
        if *open == 0 { Ok(()) } else { Err(failure("connections do not end at the target")) }
    }

    /// A connection that is open all the way and rests.
    ///
    /// # Errors
    /// When it does not come to the target.
    pub fn rest(&self, via: SocketAddr) -> io::Result<TcpStream> {
        open(via, Wish::Rest)
    }

    /// A connection whose messages of so many bytes come back, one at a time.
    ///
    /// # Errors
    /// When it does not come to the target.
    pub fn echo(&self, via: SocketAddr, size: u32) -> io::Result<Echo> {
        let tcp = open(via, Wish::Echo(size))?;
        Ok(Echo { tcp, back: vec![0; length(size)], at: 0 })
    }

    /// Begins to move bytes over so many connections, with at most `most_underway` bytes
    /// between their ends, and one write of each.
    ///
    /// # Errors
    /// When one of them does not come to the target.
    pub fn bulk(
        &self,
        via: SocketAddr,
        direction: Direction,
        streams: u32,
        most_underway: u64,
    ) -> io::Result<Bulk<'_>> {
        let tally = Arc::new(Tally { most_underway, ..Tally::default() });
        lock(&self.shared.tally).clone_from(&tally);
        // All are open before the first one moves anything, and each is elsewhere in the pattern, so
        // that bytes of one are none of another.
        let opened: io::Result<Vec<_>> = (0..streams)
            .map(|stream| stream * 997)
            .map(|from| {
                let wish = match direction {
                    Direction::Up => Wish::Send(from),
                    Direction::Down => Wish::Receive(from),
                };
                open(via, wish).map(|tcp| (tcp, from))
            })
            .collect();
        let clients = opened?
            .into_iter()
            .map(|(tcp, from)| {
                let tally = tally.clone();
                spawn(move || match direction {
                    Direction::Up => {
                        tally.send(&tcp, from)?;
                        // The target ends when it has read everything.
                        match (&tcp).read(&mut [0])? {
                            0 => Ok(()),
                            _ => Err(failure("the target said more than it has to say")),
                        }
                    }
                    Direction::Down => tally.receive(&tcp, from),
                })
            })
            .collect();
        Ok(Bulk { target: self, tally, clients })
    }

    /// New connections per second, each open all the way and closed again, so many at once.
    ///
    /// # Errors
    /// When one of them does not come to the target.
    pub fn connections(&self, via: SocketAddr, at_once: u32, window: Duration) -> io::Result<f64> {
        let begun = Arc::new(AtomicUsize::new(0));
        let start = Instant::now();
        let clients: Vec<_> = (0..at_once)
            .map(|_| {
                let begun = begun.clone();
                spawn(move || {
                    let mut made = 0_u32;
                    while start.elapsed() < window
                        && begun.fetch_add(1, Ordering::Relaxed) < MOST_CONNECTIONS
                    {
                        drop(open(via, Wish::Rest)?);
                        made += 1;
                    }
                    Ok(made)
                })
            })
            .collect();
        let made: io::Result<u32> = clients.into_iter().map(join).sum();
        let rate = f64::from(made?) / start.elapsed().as_secs_f64();
        self.wait_until_idle()?;
        Ok(rate)
    }
}

/// A connection whose messages come back.
#[derive(Debug)]
pub struct Echo {
    tcp: TcpStream,
    back: Vec<u8>,
    at: u64,
}

impl Echo {
    /// Sends one message and waits until it is back.
    ///
    /// # Errors
    /// When the connection breaks, or something else comes back.
    pub fn round_trip(&mut self) -> io::Result<Duration> {
        let message = &pattern(self.at)[..self.back.len()];
        let start = Instant::now();
        self.tcp.write_all(message)?;
        self.tcp.read_exact(&mut self.back)?;
        let time = start.elapsed();
        self.at += 1;
        if self.back == message { Ok(time) } else { Err(failure("another message came back")) }
    }

    /// What round trips take within this time, ascending; those of its first tenth do not count.
    ///
    /// # Errors
    /// As [`Echo::round_trip`].
    pub fn round_trips(&mut self, window: Duration) -> io::Result<Vec<Duration>> {
        let start = Instant::now();
        while start.elapsed() < window / 10 {
            self.round_trip()?;
        }
        let mut times = vec![self.round_trip()?];
        while start.elapsed() < window {
            times.push(self.round_trip()?);
        }
        times.sort_unstable();
        Ok(times)
    }
}

/// Bytes that move until [`Bulk::finish`].
#[derive(Debug)]
pub struct Bulk<'t> {
    target: &'t Target,
    tally: Arc<Tally>,
    clients: Vec<JoinHandle<io::Result<()>>>,
}

impl Bulk<'_> {
    /// How many bytes were received until now, over all connections.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.tally.received.load(Ordering::Relaxed)
    }

    /// Waits for the end of the window, and until anything was received. Returns how much that was,
    /// and how long it took.
    ///
    /// # Errors
    /// When nothing is received.
    pub fn measure(&self, window: Duration) -> io::Result<(u64, Duration)> {
        let (before, start) = (self.received(), Instant::now());
        loop {
            thread::sleep(window);
            let (bytes, elapsed) = (self.received() - before, start.elapsed());
            if bytes > 0 {
                return Ok((bytes, elapsed));
            }
            if elapsed > PATIENCE {
                return Err(failure("nothing moves"));
            }
        }
    }

    /// Ends all connections cleanly. Returns how many reads brought other bytes than were sent.
    ///
    /// # Errors
    /// When a connection broke, or what was sent did not all arrive.
    pub fn finish(self) -> io::Result<u64> {
        self.tally.enough.store(true, Ordering::Relaxed);
        for client in self.clients {
            join(client)?;
        }
        self.target.wait_until_idle()?;
        let sent = self.tally.sent.load(Ordering::Relaxed);
        let received = self.tally.received.load(Ordering::Relaxed);
        if sent == received {
            Ok(self.tally.corrupt.load(Ordering::Relaxed))
        } else {
            Err(failure(&format!("{sent} bytes were sent, {received} received")))
        }
    }
}

/// One connection at the target.
fn serve(mut tcp: TcpStream, shared: &Shared) -> io::Result<()> {
    prepare(&tcp)?;
    let mut wish = [0; 5];
    tcp.read_exact(&mut wish)?;
    let wish = Wish::decode(wish)?;
    // Before the answer: the next bulk may begin afterwards.
    let tally = lock(&shared.tally).clone();
    tcp.write_all(&[READY])?;
    match wish {
        Wish::Send(from) => tally.receive(&tcp, from),
        Wish::Receive(from) => tally.send(&tcp, from),
        Wish::Echo(size) => {
            let mut message = vec![0; length(size)];
            loop {
                tcp.read_exact(&mut message)?;
                tcp.write_all(&message)?;
            }
        }
        Wish::Rest => tcp.read(&mut [0]).map(drop),
    }
}

/// Connects and waits for the target's answer.
fn open(via: SocketAddr, wish: Wish) -> io::Result<TcpStream> {
    let mut tcp = TcpStream::connect_timeout(&via, PATIENCE)?;
    prepare(&tcp)?;
    tcp.write_all(&wish.encode())?;
    let mut answer = [0];
    tcp.read_exact(&mut answer)?;
    if answer == [READY] { Ok(tcp) } else { Err(failure("this is not the target")) }
}

fn prepare(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    tcp.set_read_timeout(Some(PATIENCE))?;
    tcp.set_write_timeout(Some(PATIENCE))
}

fn length(size: u32) -> usize {
    let size = usize::try_from(size).expect("addresses have 32 bits or more");
    assert!(size <= CHUNK, "a message is a piece of the pattern");
    size
}

fn spawn<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    thread::Builder::new().stack_size(STACK).spawn(work).expect("the system has threads")
}

fn join<T>(thread: JoinHandle<io::Result<T>>) -> io::Result<T> {
    thread.join().unwrap_or_else(|_| Err(failure("a client panicked")))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failure(what: &str) -> io::Error {
    io::Error::other(what.to_owned())
}
