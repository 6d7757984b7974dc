//! A hub that lies, or someone on the way to it: damage to what passes. The lies about who is a member
//! are in `hostile_hub.rs`. Whatever is done to names, keys and handshakes ends in exit code 7 and a target that nobody dialled; whatever it does to packets ends that tunnel, and the
//! bytes come by the next one.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use connect_crypto::handshake::{Local, initiate};
use connect_spec::{
    bytes::Blob,
    control::{
        ErrorCode, FromAgent, FromHub, ListedService, Reply, Request, SealedRecord, SessionKind,
        Ticket, TunnelRequest,
    },
    encoding::Encoding,
    ids::{AgentId, ChannelId, ServiceId},
    keys::IdentityKey,
    limits::{CHANNEL_WINDOW, MAX_PARKED_PER_PEER, TAG_BYTES},
    log::{Change, Entry, FIRST_OPTIONAL_CHANGE, Head, LogEntry},
    objects::{AgentRole, Certificate, Credential, CredentialKind, Issuer, NoiseKey, SUITE_1},
    record::{CloseCode, Progress, Purpose, Record, StreamId, put_trust_entry},
    signed::Signed,
    trust::Presented,
};
use connect_tests::{
    PATIENCE,
    client::{Client, Keys, Tunnel, data_socket, now, prologue, rng, tunnel_request},
    eventually,
    home::{Home, Workspace},
    hostile_relay::{Data, HostileRelay, Passing, Verdict},
    hub::Hub,
    meddle::{Meddler, Rule},
    process::Process,
    random, runtime,
    services::{Inbox, Service},
};
use futures_util::{SinkExt, StreamExt};
use tokio_tungstenite::tungstenite::Message;

type Judge = Box<dyn FnMut(Passing<'_>) -> Verdict + Send>;

/// An exposer with an honest way to the hub, and a reacher with a relay that does what it is told.
struct Stage {
    workspace: Workspace,
    reacher: Home,
    service: Service,
    inbox: Inbox,
    probed: usize,
    rule: Arc<Mutex<Judge>>,
    _relay: HostileRelay,
    exposer_agent: Process,
}

impl Stage {
    fn set() -> Self {
        let rule: Arc<Mutex<Judge>> = Arc::new(Mutex::new(Box::new(|_| Verdict::Forward)));
        let current = rule.clone();
        let hub = Hub::shared();
        let relay = HostileRelay::start(hub, move |passing| {
            (current.lock().unwrap_or_else(PoisonError::into_inner))(passing)
        });
        let workspace = Workspace::found(hub);
        // The invite is made for the honest hub; the reacher dials the relay.
        let code = workspace.founder.ok(&["invite"]);
        let reacher = Home::new();
        reacher.ok(&["join", &code, "--label", "reacher"]);
        let membership = reacher.dir().join("membership.json");
        let text = std::fs::read_to_string(&membership).expect("enrolled");
        assert!(text.contains(hub.url()));
        std::fs::write(&membership, text.replace(hub.url(), &relay.url())).expect("our own file");

        let exposer_agent = workspace.founder.up();
        let (service, inbox) = Service::answering_at_the_end(b"the end");
        workspace.founder.ok(&["expose", &service.address().to_string(), "--name", "prod-db"]);
        let probed = service.probed();
        Self { workspace, reacher, service, inbox, probed, rule, _relay: relay, exposer_agent }
    }

    fn rule(&self, rule: impl FnMut(Passing<'_>) -> Verdict + Send + 'static) {
        *self.rule.lock().unwrap_or_else(PoisonError::into_inner) = Box::new(rule);
    }

    /// Changes what the hub answers to a look-up.
    fn lookup(&self, mut change: impl FnMut(&mut Vec<ListedService>) + Send + 'static) {
        self.rule(move |passing| {
            if let Passing::ToAgent(FromHub::Reply {
                reply: Reply::Services { services, .. },
                ..
            }) = passing
            {
                change(services);
            }
            Verdict::Forward
        });
    }

    /// Changes the second handshake message.
    fn reply(&self, mut change: impl FnMut(&mut Vec<u8>) + Send + 'static) {
        self.rule(move |passing| {
            if let Passing::ToAgent(FromHub::Reply {
                reply: Reply::TunnelAccepted { message, .. },
                ..
            }) = passing
            {
                change(&mut message.0);
            }
            Verdict::Forward
        });
    }

    #[track_caller]
    fn reach_is_refused(&self, code: i32, part: &str) {
        self.reacher.fails(&["reach", "prod-db"], code, part);
        assert_eq!(self.service.accepted(), self.probed, "the target was dialled");
    }

    /// Another member, with a service of its own.
    fn other_member(&self) -> (Home, Process, Service) {
        let other = self.workspace.join("other");
        let agent = other.up();
        let service = Service::echo();
        other.ok(&["expose", &service.address().to_string(), "--name", "other"]);
        (other, agent, service)
    }

    /// What the hub has under a name, as any member sees it.
    fn listed(&self, keys: &Keys, name: &str) -> ListedService {
        let tag = keys.names.tag(&name.parse().expect("a name"));
        let reply = runtime().block_on(async {
            let hub = Hub::shared().address();
            let mut client = Client::login(hub, keys, SessionKind::Command).await;
            client.request(Request::Lookup { tag }).await
        });
        let Reply::Services { services, .. } = reply else {
            panic!("{reply:?}");
        };
        services.into_iter().next().expect("it is exposed")
    }

    /// The reacher's agent, and where it reaches the service.
    fn reached(&self) -> (Process, SocketAddr) {
        let agent = self.reacher.up();
        let address = self.reacher.reach("prod-db");
        (agent, address)
    }
}

#[test]
fn relay_that_changes_nothing_is_not_noticed() {
    let stage = Stage::set();
    let (_agent, address) = stage.reached();
    let mut client = TcpStream::connect(address).expect("the local port is bound");
    client.write_all(b"hello").expect("the tunnel takes it");
    client.shutdown(std::net::Shutdown::Write).expect("our own socket");
    let mut end = String::new();
    client.read_to_string(&mut end).expect("the answer");
    assert_eq!(end, "the end");
}

#[test]
fn changed_record_of_a_service_is_a_trust_violation() {
    let stage = Stage::set();
    let (other, _agent, other_service) = stage.other_member();
    let theirs = stage.listed(&Keys::of(&other), "other");
    let dialled = other_service.probed();

    // Parts of the entry of another service in that of the right one.
    let parts: [fn(&mut ListedService, &ListedService); 2] = [
        |listed, theirs| listed.record = theirs.record.clone(),
        |listed, theirs| listed.service_id = theirs.service_id,
    ];
    for part in parts {
        let theirs = theirs.clone();
        stage.lookup(move |services| part(&mut services[0], &theirs));
        stage.reach_is_refused(7, "does not hold");
    }
    let damages: [fn(&mut SealedRecord); 6] = [
        |record| record.counter += 1,
        |record| record.counter -= 1,
        |record| record.epoch += 1,
        |record| record.sealed.0[30] ^= 1,
        |record| record.sealed.0.truncate(64),
        |record| record.sealed.0.clear(),
    ];
    for damage in damages {
        stage.lookup(move |services| damage(&mut services[0].record));
        stage.reach_is_refused(7, "does not hold");
    }
    assert_eq!(other_service.accepted(), dialled);
}

#[test]
fn record_from_before_a_rotation_serves_once_and_never_after_a_newer_one() {
    let stage = Stage::set();
    let old = stage.listed(&Keys::of(&stage.reacher), "prod-db");
    stage.workspace.founder.ok(&["rotate"]);
    // Who looked the service up before is answered with the key that it knows.
    let replayed = old.clone();
    stage.lookup(move |services| services[0].record = replayed.record.clone());
    drop(stage.reached());
    stage.rule(|_| Verdict::Forward);
    drop(stage.reached());
    // Now that the new key was confirmed, the old one is not believed.
    stage.lookup(move |services| services[0].record = old.record.clone());
    stage.reach_is_refused(7, "older static key");
}

#[test]
fn service_is_looked_up_again_when_its_key_was_rotated_meanwhile() {
    let stage = Stage::set();
    let old = stage.listed(&Keys::of(&stage.reacher), "prod-db");
    // Twice, so that the exposer does not hold the key of the old record any more.
    stage.workspace.founder.ok(&["rotate"]);
    stage.workspace.founder.ok(&["rotate"]);
    // The command looks, then the agent does: what it finds is outdated when it uses it.
    let mut lookups = 0;
    stage.lookup(move |services| {
        lookups += 1;
        if lookups <= 2 {
            services[0].record = old.record.clone();
        }
    });
    drop(stage.reached());
}

/// Each damage to the second handshake message is a trust violation. At most seven for one stage: an
/// exposer lets a peer leave eight handshakes half open, and each of these is one.
#[track_caller]
fn check_damaged_reply(damages: [fn(&mut Vec<u8>); 7]) {
    let stage = Stage::set();
    for damage in damages {
        stage.reply(damage);
        stage.reach_is_refused(7, "could not be verified");
    }
}

#[test]
fn kem_ciphertext_cannot_be_changed_or_left_out() {
    check_damaged_reply([
        |message| message[0] ^= 1,
        |message| message[500] ^= 0x10,
        |message| message[1087] ^= 0x80,
        |message| message[..1088].fill(0),
        |message| drop(message.drain(..1088)),
        |message| message.truncate(1088),
        |message| message.clear(),
    ]);
}

#[test]
fn responders_handshake_message_cannot_be_changed() {
    check_damaged_reply([
        // The ephemeral key, the sealed payload, its tag; then the length.
        |message| message[1088] ^= 1,
        |message| message[1119] ^= 0x40,
        |message| message[1120] ^= 1,
        |message| message[1500] ^= 1,
        |message| *message.last_mut().expect("a message") ^= 0x80,
        |message| message.truncate(message.len() - 1),
        |message| message.push(0),
    ]);
}

#[test]
fn reply_to_another_handshake_is_a_trust_violation() {
    let stage = Stage::set();
    let stolen = Arc::new(Mutex::new(Vec::new()));
    let keep = stolen.clone();
    stage.reply(move |message| {
        *keep.lock().unwrap_or_else(PoisonError::into_inner) = std::mem::take(message);
    });
    stage.reach_is_refused(7, "could not be verified");
    let stolen = stolen.lock().unwrap_or_else(PoisonError::into_inner).clone();
    assert!(stolen.len() > 1088);
    let whole = stolen.clone();
    stage.reply(move |message| message.clone_from(&whole));
    stage.reach_is_refused(7, "could not be verified");
    // The ciphertext alone, and the Noise message alone.
    let part = stolen.clone();
    stage.reply(move |message| message[..1088].copy_from_slice(&part[..1088]));
    stage.reach_is_refused(7, "could not be verified");
    stage.reply(move |message| message[1088..].copy_from_slice(&stolen[1088..]));
    stage.reach_is_refused(7, "could not be verified");
}

#[test]
fn ticket_of_another_tunnel_opens_nothing() {
    let stage = Stage::set();
    stage.rule(|passing| {
        if let Passing::ToAgent(FromHub::Reply {
            reply: Reply::TunnelAccepted { ticket, .. },
            ..
        }) = passing
        {
            *ticket = Ticket::new([7; 32]);
        }
        Verdict::Forward
    });
    // A running agent says so and goes on trying; without one the command itself would.
    let _agent = stage.reacher.up();
    stage.reach_is_refused(4, "401");
}

#[test]
fn first_handshake_message_cannot_be_changed_anywhere() {
    let stage = Stage::set();
    let damages: [fn(&mut TunnelRequest); 8] = [
        |request| request.message.0[0] ^= 1,
        |request| request.message.0[40] ^= 1,
        |request| *request.message.0.last_mut().expect("a message") ^= 1,
        |request| request.message.0.truncate(32),
        |request| request.message = Blob(Vec::new()),
        |request| request.channel_id.0[0] ^= 1,
        |request| request.tunnel_id.0[0] ^= 1,
        |request| request.tunnel_no += 1,
    ];
    for damage in damages {
        stage.rule(move |passing| {
            if let Passing::ToHub(FromAgent::Request {
                request: Request::OpenTunnel(request),
                ..
            }) = passing
            {
                damage(request);
            }
            Verdict::Forward
        });
        // The exposer says no, through a hub that the reacher does not believe: a refusal, no alarm.
        stage.reach_is_refused(6, "");
    }
}

#[test]
fn replayed_first_message_reaches_nobody() {
    let stage = Stage::set();
    let seen = Arc::new(Mutex::new(None));
    let keep = seen.clone();
    stage.rule(move |passing| {
        if let Passing::ToHub(FromAgent::Request {
            request: Request::OpenTunnel(request), ..
        }) = passing
        {
            *keep.lock().unwrap_or_else(PoisonError::into_inner) = Some(request.clone());
        }
        Verdict::Forward
    });
    let (agent, _) = stage.reached();
    drop(agent);
    let seen = seen.lock().unwrap_or_else(PoisonError::into_inner).clone().expect("one passed");
    let keys = Keys::of(&stage.reacher);
    let before = stage.service.accepted();
    runtime().block_on(async {
        let hub = Hub::shared().address();
        let mut client = Client::login(hub, &keys, SessionKind::Command).await;
        for _ in 0..3 {
            let reply = client.request(Request::OpenTunnel(seen.clone())).await;
            assert!(matches!(reply, Reply::Error(_)), "{reply:?}");
        }
        // Under another tunnel id it is another prologue.
        let mut renamed = seen;
        renamed.tunnel_id.0[0] ^= 1;
        let reply = client.request(Request::OpenTunnel(renamed)).await;
        assert!(matches!(reply, Reply::Error(_)), "{reply:?}");
    });
    assert_eq!(stage.service.accepted(), before);
}

/// What a hub shows to who joins in place of the invite's credential. All but one are signed as they must be:
/// that they hold does not make them the invite's.
#[test]
fn credential_that_is_not_that_of_the_invite_is_a_trust_violation() {
    let rule: Arc<Mutex<Judge>> = Arc::new(Mutex::new(Box::new(|_| Verdict::Forward)));
    let current = rule.clone();
    let relay = HostileRelay::start(Hub::shared(), move |passing| {
        (current.lock().unwrap_or_else(PoisonError::into_inner))(passing)
    });
    let follow = |next: Judge| *rule.lock().unwrap_or_else(PoisonError::into_inner) = next;
    let workspace = Workspace::found_at(&relay.url());
    let code = workspace.founder.ok(&["invite", "--tag", "db"]);
    let joiner = Home::new();
    let is_refused = |part: &str| {
        joiner.fails(&["join", &code], 7, part);
        assert!(!joiner.dir().join("membership.json").exists(), "{part}");
    };
    type Exchange = fn(&mut Credential);
    let changes: [(&str, Exchange); 5] = [
        ("of another invite", |other| other.invite_key = IdentityKey([7; 32])),
        ("of another invite", |other| other.wrap_key_hash = [7; 32]),
        ("tags", |other| other.attrs = [7; 32]),
        ("not of one kind", |other| {
            (other.kind, other.role) = (CredentialKind::Share, AgentRole::Guest);
            other.services = Some(vec![ServiceId([7; 16])]);
        }),
        ("not signed by a signer", |other| other.issuer = IdentityKey([7; 32])),
    ];
    for (part, change) in changes {
        let founder = Keys::of(&workspace.founder);
        follow(Box::new(move |passing| {
            if let Passing::ToAgent(FromHub::Invitation { credential, .. }) = passing {
                let sound = Signed::<Credential>::decode(&credential.0).expect("the hub's own");
                let mut other = sound.object().clone();
                change(&mut other);
                let signer = founder.signer.as_ref().expect("a founder's");
                *credential = Blob(signer.sign(&other).encode());
            }
            Verdict::Forward
        }));
        is_refused(part);
    }
    follow(Box::new(|passing| {
        if let Passing::ToAgent(FromHub::Reply {
            reply: Reply::Log { entries, more, .. }, ..
        }) = passing
        {
            entries.clear();
            *more = true;
        }
        Verdict::Forward
    }));
    is_refused("without an end");
    follow(Box::new(|_| Verdict::Forward));
    joiner.ok(&["join", &code]);
}

/// Changes one character, or one byte, in the middle of a packet; it stays well-formed.
fn flip(message: &mut Message) {
    *message = match std::mem::replace(message, Message::Ping(Vec::new().into())) {
        Message::Text(text) => {
            let mut text = text.to_string().into_bytes();
            let middle = text.len() / 2;
            text[middle] = if text[middle] == b'A' { b'B' } else { b'A' };
            Message::text(String::from_utf8(text).expect("base64"))
        }
        Message::Binary(bytes) => {
            let mut bytes = bytes.to_vec();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            Message::Binary(bytes.into())
        }
        other @ (Message::Ping(_) | Message::Pong(_) | Message::Close(_) | Message::Frame(_)) => {
            other
        }
    };
}

/// Sends a megabyte while `tamper` judges one packet that is on its way to the target. The tunnel ends
/// of it; the conversation goes on in the next one, and every byte arrives once, as it was sent.
#[track_caller]
fn check_tampering(tamper: fn(&mut Message) -> Verdict) {
    let stage = Stage::set();
    let (_agent, address) = stage.reached();
    let mut client = TcpStream::connect(address).expect("the local port is bound");
    client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    client.set_write_timeout(Some(PATIENCE)).expect("our own socket");
    let bytes = random(1 << 20);
    client.write_all(&bytes[..1000]).expect("the tunnel takes it");
    eventually("the first bytes arrive", || {
        stage.inbox.received().first().is_some_and(|received| received.bytes.len() == 1000)
    });
    let (mut tampered_with, last) = (None, Arc::new(AtomicUsize::new(0)));
    let last_socket = last.clone();
    stage.rule(move |passing| {
        let Passing::Data(Data { socket, from_agent, message, .. }) = passing else {
            return Verdict::Forward;
        };
        last_socket.fetch_max(socket, Ordering::SeqCst);
        // A large one: it carries what the client sends.
        if from_agent && tampered_with.is_none() && message.len() > 1000 {
            tampered_with = Some(socket);
            return tamper(message);
        }
        Verdict::Forward
    });
    let before = last.load(Ordering::SeqCst);
    client.write_all(&bytes[1000..]).expect("the tunnel takes it, or the next one");
    client.shutdown(std::net::Shutdown::Write).expect("our own socket");
    let mut end = String::new();
    client.read_to_string(&mut end).expect("the answer, and its clean end");
    assert_eq!(end, "the end");
    assert!(last.load(Ordering::SeqCst) > before, "the tunnel went on as if nothing had been");
    let received = stage.inbox.received();
    assert_eq!(received.len(), 1, "one connection is one connection");
    assert_eq!(received[0].clean, Some(true));
    assert!(received[0].bytes == bytes, "an altered byte was delivered, or one was lost");
}

#[test]
fn flipped_packet_is_never_delivered() {
    check_tampering(|message| {
        flip(message);
        Verdict::Forward
    });
}

#[test]
fn replayed_packet_is_never_delivered_twice() {
    check_tampering(|_| Verdict::Twice);
}

#[test]
fn dropped_packet_is_never_passed_over() {
    check_tampering(|_| Verdict::Drop);
}

#[test]
fn swapped_packets_are_never_delivered() {
    check_tampering(|_| Verdict::Swap);
}

#[test]
fn packet_that_comes_back_is_never_taken_for_the_peers() {
    check_tampering(|_| Verdict::Reflect);
}

#[test]
fn packet_that_is_no_packet_ends_the_tunnel() {
    check_tampering(|message| {
        *message = Message::text("!not base64!");
        Verdict::Forward
    });
}

#[test]
fn altered_packet_to_the_reacher_is_never_delivered() {
    let stage = Stage::set();
    let echo = Service::echo();
    stage.workspace.founder.ok(&["expose", &echo.address().to_string(), "--name", "echo"]);
    let _agent = stage.reacher.up();
    let address = stage.reacher.reach("echo");
    let mut client = TcpStream::connect(address).expect("the local port is bound");
    client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    let mut done = false;
    stage.rule(move |passing| {
        if let Passing::Data(Data { from_agent: false, message, .. }) = passing
            && !done
            && message.len() > 4000
        {
            done = true;
            flip(message);
        }
        Verdict::Forward
    });
    let bytes = random(20_000);
    client.write_all(&bytes).expect("the tunnel takes it");
    let mut read = vec![0; bytes.len()];
    client.read_exact(&mut read).expect("the next tunnel brings it");
    assert!(read == bytes, "an altered byte was delivered");
}

/// Echoes a megabyte while one tunnel after the other is tampered with in one direction, until the side
/// that gets the altered packets reports it. The connection goes on as if nothing had been.
#[track_caller]
fn check_reported(to_the_exposer: bool) {
    const ALARMING: usize = 5;
    let stage = Stage::set();
    let echo = Service::echo();
    stage.workspace.founder.ok(&["expose", &echo.address().to_string(), "--name", "echo"]);
    let reacher_agent = stage.reacher.up();
    let address = stage.reacher.reach("echo");
    let mut client = TcpStream::connect(address).expect("the local port is bound");
    client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    let (mut left, mut last) = (ALARMING, None);
    stage.rule(move |passing| {
        if let Passing::Data(Data { socket, from_agent, message, .. }) = passing
            && from_agent == to_the_exposer
            && left > 0
            && last != Some(socket)
            && message.len() > 1000
        {
            (left, last) = (left - 1, Some(socket));
            flip(message);
        }
        Verdict::Forward
    });
    let bytes = random(1 << 20);
    let mut writing = client.try_clone().expect("one more handle");
    let sent = bytes.clone();
    let writer = std::thread::spawn(move || writing.write_all(&sent));
    let mut read = vec![0; bytes.len()];
    client.read_exact(&mut read).expect("the tunnels after them bring it");
    writer.join().expect("no panic").expect("it stalls, but does not break");
    assert!(read == bytes, "an altered byte was delivered");
    let (seen_by, not_by) = if to_the_exposer {
        (&stage.exposer_agent, &reacher_agent)
    } else {
        (&reacher_agent, &stage.exposer_agent)
    };
    seen_by.stderr_line("event=\"tampering\" service=echo");
    assert_eq!(seen_by.stderr().matches("event=\"tampering\"").count(), 1, "once for five");
    assert!(!not_by.stderr().contains("event=\"tampering\""), "it saw nothing altered");
}

#[test]
fn tampering_on_the_way_to_the_exposer_is_reported_there() {
    check_reported(true);
}

#[test]
fn tampering_on_the_way_to_the_reacher_is_reported_there() {
    check_reported(false);
}

/// What a stranger, or a member that does not finish, sends in place of the reacher's first message: the
/// relay stands before the exposer, as a hub that colludes with the stranger would.
struct Door {
    workspace: Workspace,
    reacher: Home,
    service: Service,
    probed: usize,
    rule: Arc<Mutex<Judge>>,
    _relay: HostileRelay,
    _exposer_agent: Process,
}

impl Door {
    fn set() -> Self {
        let rule: Arc<Mutex<Judge>> = Arc::new(Mutex::new(Box::new(|_| Verdict::Forward)));
        let current = rule.clone();
        let relay = HostileRelay::start(Hub::shared(), move |passing| {
            (current.lock().unwrap_or_else(PoisonError::into_inner))(passing)
        });
        let workspace = Workspace::found_at(&relay.url());
        let reacher = workspace.join("reacher");
        let _exposer_agent = workspace.founder.up();
        let service = Service::echo();
        workspace.founder.ok(&["expose", &service.address().to_string(), "--name", "prod-db"]);
        let probed = service.probed();
        Self { workspace, reacher, service, probed, rule, _relay: relay, _exposer_agent }
    }

    /// The exposer's place in the trust log, once it has closed the invite by which the reacher joined: who
    /// names another has to compare logs first.
    fn head(&self) -> Head {
        let founder = &self.workspace.founder;
        eventually("the spent invite is closed", || founder.json(&["status"])["trust"]["seq"] == 1);
        Keys::of(founder).trust.head()
    }

    /// The id under which the hub lists a service.
    fn service_id(&self, member: &Keys, name: &str) -> ServiceId {
        let tag = member.names.tag(&name.parse().expect("a name"));
        runtime().block_on(async {
            let hub = Hub::shared().address();
            let mut client = Client::login(hub, member, SessionKind::Command).await;
            let reply = client.request(Request::Lookup { tag }).await;
            let Reply::Services { services, .. } = reply else { panic!("{reply:?}") };
            services[0].service_id
        })
    }

    /// Replaces what the exposer is asked: by whom, and with which first message.
    fn forge(
        &self,
        forge: impl Fn(&mut AgentId, &mut TunnelRequest) + Send + 'static,
    ) -> Arc<AtomicUsize> {
        let answers = Arc::new(AtomicUsize::new(0));
        let accepted = answers.clone();
        *self.rule.lock().unwrap_or_else(PoisonError::into_inner) = Box::new(move |passing| {
            match passing {
                Passing::ToAgent(FromHub::IncomingTunnel { initiator, request, .. }) => {
                    forge(initiator, request);
                }
                Passing::ToHub(FromAgent::AcceptTunnel { .. }) => {
                    accepted.fetch_add(1, Ordering::SeqCst);
                }
                Passing::ToHub(_) | Passing::ToAgent(_) | Passing::Data(_) => {}
            }
            Verdict::Forward
        });
        answers
    }
}

/// A handshake's own side, made of the parts of different agents.
fn local<'k>(keys: &'k Keys, presented: &'k Presented, realm: &'k Keys, head: Head) -> Local<'k> {
    Local {
        static_keypair: &keys.static_keypair,
        presented,
        attrs: &keys.attrs,
        head,
        realm_secret: &realm.epoch.realm,
    }
}

#[test]
fn stranger_gets_no_answer_even_with_the_hub_for_a_friend() {
    let door = Door::set();
    let other = Workspace::found(Hub::shared());
    let founder = Keys::of(&door.workspace.founder);
    let founder_static = founder.static_keypair.public();
    // A certificate and a NoiseKey in the right workspace, signed with what a stranger has.
    let certificate = |stranger: &Keys, issuer: Issuer| {
        let signer = stranger.signer.as_ref().expect("a founder's");
        signer.sign(&Certificate {
            workspace_id: founder.workspace_id,
            identity_key: stranger.signing.public(),
            role: AgentRole::Member,
            attrs: stranger.attrs.hash(),
            serial: 1,
            not_after: None,
            issuer,
            services: None,
        })
    };
    let noise_key = |stranger: &Keys, agent_id: AgentId| {
        stranger.signing.sign(&NoiseKey {
            workspace_id: founder.workspace_id,
            agent_id,
            suite: SUITE_1,
            counter: 2,
            static_key: stranger.static_keypair.public(),
            wrap_key_hash: stranger.wrap.public().hash(),
        })
    };
    let (stranger, member) = (Keys::of(&other.founder), Keys::of(&door.reacher));
    let id = AgentId::of(&founder.workspace_id, &stranger.signing.public());
    let own_signer = stranger.signer.as_ref().expect("a founder's").public();
    let signer = founder.signer.as_ref().expect("a founder's").public();
    let credential = member.presented.credential.clone();
    let of_credential = credential
        .as_ref()
        .map(|credential| Issuer::Credential(credential.hash()))
        .expect("joined");
    let presented = |issuer: Issuer, credential: &Option<_>| Presented {
        certificate: certificate(&stranger, issuer),
        credential: Option::clone(credential),
        noise_key: noise_key(&stranger, id),
    };
    let guises = [
        ("of another workspace", stranger.agent_id, stranger.presented.clone()),
        ("certified by itself", id, presented(Issuer::Signer(own_signer), &None)),
        ("as if by the founder", id, presented(Issuer::Signer(signer), &None)),
        ("as if by the member's invite", id, presented(of_credential, &credential)),
        (
            "a member with another static key",
            member.agent_id,
            Presented {
                noise_key: noise_key(&stranger, member.agent_id),
                ..member.presented.clone()
            },
        ),
        ("under a member's id", member.agent_id, presented(Issuer::Signer(own_signer), &None)),
    ];
    for (guise, id, presented) in guises {
        // Once without the realm secret of the workspace, once as if that had leaked.
        for leaked in [false, true] {
            let (stranger, member) = (Keys::of(&other.founder), Keys::of(&door.reacher));
            let presented = presented.clone();
            let accepted = door.forge(move |initiator, request| {
                let prologue = prologue(member.workspace_id, id, request);
                let realm = if leaked { &member } else { &stranger };
                let side = local(&stranger, &presented, realm, member.trust.head());
                let (_, message) = initiate(&side, &prologue, &founder_static, &mut rng())
                    .expect("a message of the right form");
                *initiator = id;
                request.message = Blob(message);
            });
            door.reacher.fails(&["reach", "prod-db"], 6, "");
            assert_eq!(accepted.load(Ordering::SeqCst), 0, "{guise}: answered");
            assert_eq!(door.service.accepted(), door.probed, "{guise}: the target was dialled");
        }
    }
    // The door is open to whom it should be.
    let accepted = door.forge(|_, _| {});
    let _agent = door.reacher.up();
    door.reacher.reach("prod-db");
    assert_eq!(accepted.load(Ordering::SeqCst), 1);
}

#[test]
fn nothing_is_dialled_before_the_first_authenticated_record() {
    let door = Door::set();
    let member = Keys::of(&door.reacher);
    let exposer = Keys::of(&door.workspace.founder);
    let hub = Hub::shared().address();
    let listed = door.service_id(&member, "prod-db");
    for garbage in [false, true] {
        runtime().block_on(async {
            let mut client = Client::login(hub, &member, SessionKind::Command).await;
            let mut request = tunnel_request(listed, exposer.agent_id);
            let prologue = prologue(member.workspace_id, member.agent_id, &request);
            let side = local(&member, &member.presented, &member, member.trust.head());
            let (waiting, message) =
                initiate(&side, &prologue, &exposer.static_keypair.public(), &mut rng())
                    .expect("a sound handshake");
            request.message = Blob(message);
            let Reply::TunnelAccepted { message, ticket } =
                client.request(Request::OpenTunnel(request)).await
            else {
                panic!("a member is answered");
            };
            waiting.read(&message.0).expect("the exposer's answer holds");
            let mut socket = data_socket(hub, ticket.reveal(), Encoding::Base64)
                .await
                .expect("the ticket is ours");
            if garbage {
                let noise = base64_simd::STANDARD_NO_PAD.encode_to_string(random(200));
                socket.send(Message::text(noise)).await.expect("the hub relays it");
                // The exposer ends the tunnel, and nothing else.
                while let Some(Ok(_)) = socket.next().await {}
            }
        });
        assert_eq!(door.service.accepted(), door.probed, "the target was dialled");
    }
    // The exposer is as it was.
    let _agent = door.reacher.up();
    door.reacher.reach("prod-db");
}

/// A handshake that is sound but for whom it is meant for: nobody answers in the name of another.
#[test]
fn message_for_another_responder_is_not_answered() {
    let door = Door::set();
    let other = Keys::of(&door.workspace.join("other")).agent_id;
    let member = Keys::of(&door.reacher);
    let to = Keys::of(&door.workspace.founder).static_keypair.public();
    let accepted = door.forge(move |initiator, request| {
        request.responder = other;
        let prologue = prologue(member.workspace_id, *initiator, request);
        let side = local(&member, &member.presented, &member, member.trust.head());
        let (_, message) = initiate(&side, &prologue, &to, &mut rng()).expect("a sound handshake");
        request.message = Blob(message);
    });
    door.reacher.fails(&["reach", "prod-db"], 6, "");
    assert_eq!(accepted.load(Ordering::SeqCst), 0, "answered");
    assert_eq!(door.service.accepted(), door.probed, "the target was dialled");
}

/// Whoever got hold of a static key that was rotated away, and of all else that its agent showed with it.
#[test]
fn static_key_from_before_a_rotation_opens_no_door_where_the_newer_was_seen() {
    let door = Door::set();
    let before = Keys::of(&door.reacher);
    let to = Keys::of(&door.workspace.founder).static_keypair.public();
    door.reacher.ok(&["rotate"]);
    let agent = door.reacher.up();
    door.reacher.reach("prod-db");
    drop(agent);
    let dialled = door.service.accepted();
    let accepted = door.forge(move |initiator, request| {
        let prologue = prologue(before.workspace_id, *initiator, request);
        let side = local(&before, &before.presented, &before, before.trust.head());
        let (_, message) = initiate(&side, &prologue, &to, &mut rng()).expect("a sound handshake");
        request.message = Blob(message);
    });
    door.reacher.fails(&["reach", "prod-db"], 6, "");
    assert_eq!(accepted.load(Ordering::SeqCst), 0, "answered");
    assert_eq!(door.service.accepted(), dialled, "the target was dialled");
}

/// What a reacher by hand sends first, on the first tunnel of a channel or on a later one.
fn hello(new: bool) -> Record<'static> {
    let progress = Progress {
        next_stream: StreamId::FIRST,
        max_data: CHANNEL_WINDOW,
        received: 0,
        streams: Vec::new(),
        more: false,
    };
    Record::Hello { new, progress }
}

/// The answer to HELLO: READY and WELCOME, or what is said in their place.
async fn answer_to_hello(tunnel: &mut Tunnel) -> Vec<u8> {
    let answer = tunnel.read().await.expect("an answer");
    if Record::decode(&answer) == Ok(Record::Ready) {
        return tunnel.read().await.expect("what follows READY");
    }
    answer
}

fn is_welcome(record: &[u8]) -> bool {
    matches!(Record::decode(record), Ok(Record::Welcome(_)))
}

#[test]
fn number_of_a_tunnel_that_was_used_takes_no_channel_over() {
    let door = Door::set();
    let member = Keys::of(&door.reacher);
    let hub = Hub::shared().address();
    let service = door.service_id(&member, "prod-db");
    let channel = ChannelId(random(16).try_into().expect("16 bytes"));
    let head = door.head();
    runtime().block_on(async {
        let open = async |number: u32, new: bool| {
            let place = (channel, number);
            let opened = Tunnel::open_in(hub, &member, service, head, place).await;
            let mut tunnel = opened.expect("a member is answered");
            tunnel.send(&hello(new)).await;
            let answer = answer_to_hello(&mut tunnel).await;
            (tunnel, answer)
        };
        let (mut going, answer) = open(5, true).await;
        assert!(is_welcome(&answer), "{answer:?}");
        for used in [5, 4, 0] {
            let (_, answer) = open(used, false).await;
            let stale = Record::TunnelClose(CloseCode::Stale);
            assert_eq!(Record::decode(&answer), Ok(stale), "number {used}");
        }
        // The tunnel that is up did not notice.
        going.send(&Record::Ping(77)).await;
        while Record::decode(&going.read().await.expect("it is up")) != Ok(Record::Pong(77)) {}
        let (_newest, answer) = open(6, false).await;
        assert!(is_welcome(&answer), "{answer:?}");
        while going.read().await.is_some() {}
    });
}

/// What the exposer says last to a member that shows it an entry of the trust log which it did not have.
fn last_word_to_who_shows(change: impl FnOnce(&Keys) -> Change) {
    let door = Door::set();
    let (member, founder) = (Keys::of(&door.reacher), Keys::of(&door.workspace.founder));
    let hub = Hub::shared().address();
    let service = door.service_id(&member, "prod-db");
    let head = door.head();
    let signer = founder.signer.as_ref().expect("a founder's");
    let entry = LogEntry::Entry(signer.sign(&Entry {
        workspace_id: founder.workspace_id,
        seq: head.seq + 1,
        prev: head.hash,
        time: now(),
        changes: vec![change(&member)],
        abandons: Vec::new(),
    }));
    runtime().block_on(async {
        let opened = Tunnel::open(hub, &member, service, entry.head()).await;
        let mut tunnel = opened.expect("the exposer does not know yet");
        let asked = tunnel.read().await.expect("a word");
        assert!(matches!(Record::decode(&asked), Ok(Record::TrustGet(_))), "{asked:02x?}");
        let mut entries = Vec::new();
        assert!(put_trust_entry(&mut entries, &entry.encode()));
        for said in [Record::Trust { more: false, entries: &entries }, Record::Ready, hello(true)] {
            tunnel.send(&said).await;
        }
        let mut answer = tunnel.read().await.expect("the exposer's word");
        if Record::decode(&answer) == Ok(Record::Ready) {
            answer = tunnel.read().await.expect("the exposer's last word");
        }
        assert_eq!(Record::decode(&answer), Ok(Record::TunnelClose(CloseCode::Forbidden)));
    });
    assert_eq!(door.service.accepted(), door.probed, "the target was dialled");
}

/// Whoever is behind in the trust log learns from its peer, and holds what it learned against that very peer
/// first.
#[test]
fn peer_that_shows_that_it_was_revoked_is_out_before_it_says_anything() {
    last_word_to_who_shows(|member| Change::RevokeAgent {
        agent_id: member.agent_id,
        below_serial: None,
    });
}

/// And what it learned may be that nobody gets a tunnel.
#[test]
fn peer_that_shows_an_entry_which_cannot_be_read_gets_no_further() {
    last_word_to_who_shows(|_| Change::Unknown(FIRST_OPTIONAL_CHANGE - 1));
}

/// A peer that begins conversations and leaves them: of those that wait for a tunnel so many are kept.
#[test]
fn conversations_that_a_peer_leaves_are_kept_up_to_a_limit() {
    let door = Door::set();
    let member = Keys::of(&door.reacher);
    let hub = Hub::shared().address();
    let service = door.service_id(&member, "prod-db");
    let head = door.head();
    runtime().block_on(async {
        let open = async |channel: ChannelId, number: u32, new: bool| {
            let place = (channel, number);
            let opened = Tunnel::open_in(hub, &member, service, head, place).await;
            let mut tunnel = opened.expect("a member is answered");
            tunnel.send(&hello(new)).await;
            answer_to_hello(&mut tunnel).await
        };
        let channel = |number: usize| {
            let mut id = [7; 16];
            id[..8].copy_from_slice(&(number as u64).to_be_bytes());
            ChannelId(id)
        };
        // Some more, as the exposer may hear late that the last of them are left.
        let count = MAX_PARKED_PER_PEER + 16;
        for number in 0..count {
            assert!(is_welcome(&open(channel(number), 0, true).await));
        }
        let lost = Record::ChannelClose(CloseCode::Lost);
        assert_eq!(Record::decode(&open(channel(0), 1, false).await), Ok(lost));
        assert!(is_welcome(&open(channel(count - 1), 1, false).await));
    });
}

/// One bit of each byte of the first message, in a handshake that is sound but for that: the exposer answers
/// none, and whoever is behind it hears of none.
#[test]
fn bit_flipped_in_any_byte_of_the_first_message_is_refused() {
    let door = Door::set();
    let member = Keys::of(&door.reacher);
    let exposer = Keys::of(&door.workspace.founder);
    let hub = Hub::shared().address();
    let accepted = door.forge(|_, _| {});
    let service = door.service_id(&member, "prod-db");
    runtime().block_on(async {
        let mut client = Client::login(hub, &member, SessionKind::Command).await;
        let (mut position, mut length) = (0, 1);
        while position < length {
            let mut request = tunnel_request(service, exposer.agent_id);
            let prologue = prologue(member.workspace_id, member.agent_id, &request);
            let side = local(&member, &member.presented, &member, member.trust.head());
            let to = exposer.static_keypair.public();
            let (_, mut message) =
                initiate(&side, &prologue, &to, &mut rng()).expect("a sound handshake");
            length = message.len();
            message[position] ^= 1 << (position % 8);
            request.message = Blob(message);
            let Reply::Error(report) = client.request(Request::OpenTunnel(request)).await else {
                panic!("answered, with byte {position} changed");
            };
            // Hub and exposer answer so many in a second: this one was not looked at.
            if [ErrorCode::RateLimited, ErrorCode::Busy].contains(&report.code) {
                let wait = report.retry_in_ms.unwrap_or(100);
                tokio::time::sleep(Duration::from_millis(wait.into())).await;
                continue;
            }
            assert_eq!(report.code, ErrorCode::Refused, "byte {position}");
            position += 1;
        }
        assert!(length > 2000, "two thirds of it are an ML-KEM key");
    });
    assert_eq!(accepted.load(Ordering::SeqCst), 0);
    assert_eq!(door.service.accepted(), door.probed, "the target was dialled");
    // The exposer is as it was.
    let _agent = door.reacher.up();
    door.reacher.reach("prod-db");
}

/// One bit of each byte of the records that begin a tunnel: none is taken, so nothing is dialled for the first
/// ones, and not a byte reaches the target by the last.
#[test]
fn bit_flipped_in_any_byte_of_the_first_records_ends_the_tunnel() {
    let door = Door::set();
    let (service, inbox) = Service::answering_at_the_end(b"");
    let target = service.address().to_string();
    door.workspace.founder.ok(&["expose", &target, "--name", "kept"]);
    let probed = service.probed();
    let member = Keys::of(&door.reacher);
    let hub = Hub::shared().address();
    let service_id = door.service_id(&member, "kept");
    let head = door.head();
    let stream = StreamId::FIRST;
    let records = [
        hello(true),
        Record::Open { stream, purpose: Purpose::Target },
        Record::Data { stream, offset: 0, bytes: b"for the target" },
    ];
    let mut dialled = probed;
    for (number, record) in records.iter().enumerate() {
        let mut plaintext = Vec::new();
        record.encode(&mut plaintext);
        for position in 0..plaintext.len() + TAG_BYTES {
            runtime().block_on(async {
                let opened = Tunnel::open(hub, &member, service_id, head).await;
                let mut tunnel = opened.expect("a member is answered");
                for before in &records[..number] {
                    tunnel.send(before).await;
                }
                if number > 0 {
                    assert!(is_welcome(&answer_to_hello(&mut tunnel).await));
                }
                tunnel.send_bent(record, |packet| packet[position] ^= 1 << (position % 8)).await;
                while let Some(answer) = tunnel.read().await {
                    // What was sound may be answered.
                    let answer = Record::decode(&answer).expect("the exposer keeps to the rules");
                    assert!(!matches!(answer, Record::Ack { .. }), "{position} of {number}");
                }
            });
            // Only a sound OPEN is one to dial for.
            dialled += usize::from(number == 2);
            if number < 2 {
                assert_eq!(service.accepted(), probed, "byte {position} of record {number}");
            }
        }
    }
    eventually("the sound OPENs were dialled for", || service.accepted() == dialled);
    assert!(inbox.received().is_empty(), "{:?}", inbox.received());
}

/// Meddles once with one packet of each tunnel that is opened from now on, as the next rule says.
struct OneRuleForEachTunnel {
    rules: Vec<Rule>,
    /// The rule at work.
    meddler: Option<Meddler>,
    /// The data socket that it is for.
    socket: usize,
    /// Rules that were followed, and how many there were when this one began.
    done: Arc<AtomicUsize>,
    done_before: usize,
}

impl OneRuleForEachTunnel {
    fn judge(&mut self, passing: Passing<'_>) -> Verdict {
        let Passing::Data(data) = passing else { return Verdict::Forward };
        if data.socket > self.socket {
            self.socket = data.socket;
            // A tunnel may end before its packet comes; then the next one has its rule.
            if self.meddler.is_some() && self.done.load(Ordering::SeqCst) > self.done_before {
                self.rules.pop();
            }
            self.done_before = self.done.load(Ordering::SeqCst);
            let done = self.done.clone();
            self.meddler = self.rules.last().map(|rule| {
                Meddler::new(vec![rule.clone()], move |report| {
                    done.fetch_add(usize::from(report["done"] == true), Ordering::SeqCst);
                })
            });
        }
        match &mut self.meddler {
            Some(meddler) if data.socket == self.socket => meddler.judge(Passing::Data(data)),
            Some(_) => Verdict::Forward,
            // The tunnel that is there when this begins only gives way to the next.
            None if !self.rules.is_empty() => {
                flip(data.message);
                Verdict::Forward
            }
            None => Verdict::Forward,
        }
    }
}

/// Each of the first packets of a tunnel, bent, cut and doubled: whatever is done, one connection goes on over
/// tunnel after tunnel, and not a byte of it is lost, changed or repeated.
#[test]
fn meddling_with_any_of_the_first_packets_costs_a_tunnel_and_no_byte() {
    let stage = Stage::set();
    let echo = Service::echo();
    stage.workspace.founder.ok(&["expose", &echo.address().to_string(), "--name", "echo"]);
    let _agent = stage.reacher.up();
    let last_socket = Arc::new(AtomicUsize::new(0));
    let last = last_socket.clone();
    stage.rule(move |passing| {
        if let Passing::Data(data) = passing {
            last.fetch_max(data.socket, Ordering::SeqCst);
        }
        Verdict::Forward
    });
    let mut client = TcpStream::connect(stage.reacher.reach("echo")).expect("the local port");
    client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    client.set_nodelay(true).expect("our own socket");
    let mut rules: Vec<Rule> = Vec::new();
    for (deeds, numbers) in
        [(&["flip=130", "truncate=17", "twice"][..], [1, 3]), (&["flip=0", "truncate=0"], [0, 4])]
    {
        for (deed, number) in deeds.iter().flat_map(|deed| numbers.map(|number| (deed, number))) {
            for place in ["up", "down"] {
                rules.push(format!("{place}#{number}:{deed}").parse().expect("a rule"));
            }
        }
    }
    let (count, done) = (rules.len(), Arc::new(AtomicUsize::new(0)));
    let mut one_each = OneRuleForEachTunnel {
        rules,
        meddler: None,
        socket: last_socket.load(Ordering::SeqCst),
        done: done.clone(),
        done_before: 0,
    };
    stage.rule(move |passing| one_each.judge(passing));
    let start = std::time::Instant::now();
    let mut sent = 0_u64;
    while done.load(Ordering::SeqCst) < count {
        assert!(start.elapsed() < 4 * PATIENCE, "{} of {count}", done.load(Ordering::SeqCst));
        let bytes = random(1500);
        client.write_all(&bytes).expect("the tunnel takes it, or the next one");
        let mut echoed = vec![0; bytes.len()];
        client.read_exact(&mut echoed).expect("the echo");
        assert!(echoed == bytes, "after {sent} bytes");
        sent += 1500;
    }
}
