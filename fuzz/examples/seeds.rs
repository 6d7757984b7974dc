//! Writes the seeds of `fuzz/corpus`: one well-formed input of each kind, from which the fuzzer departs.
//!
//! `cargo run -p connect-fuzz --example seeds`, after a change of the format. Signatures are placeholders
//! here, for the targets with these seeds do not get that far; those that do bring their own.

use std::{fs, io, path::Path};

use connect_spec::{
    audit::{ApiKeyId, AuditHead, AuditRow, Event, Recorded, Scope, TunnelEnd, link},
    bytes::Blob,
    check::{CheckReport, Outcome, Printable, Protocol, Resolved, TlsReport},
    control::{
        self, AddressedWrap, ApiKey, EpochWrap, ErrorCode, ErrorReport, FromAgent, FromHub,
        ListedApiKey, Login, Nonce, PresentedBlobs, Recipient, Redeem, Reply, Request,
        SealedRecord, SessionKind, Ticket, TunnelRequest,
    },
    encoding::{Encoding, encode_base64},
    ids::{AgentId, ChannelId, CredentialId, LookupTag, ServiceId, TunnelId, WorkspaceId},
    keys::{IdentityKey, Signature, StaticPublicKey},
    log::{Beat, Change, Entry, EntryHash, Head, LogEntry, ObjectHash, Policy, Recovery},
    objects::{
        AgentRecord, AgentRole, Attributes, Certificate, Credential, CredentialKind, Founder,
        Genesis, Issuer, NoiseKey, SUITE_1, ServiceRecord, SignerRole,
    },
    record::{
        CloseCode, End, Progress, Purpose, Record, RekeyTry, ResetCode, StreamId, StreamState,
        put_trust_entry,
    },
    signed::{Body, Signed},
};

const WORKSPACE: WorkspaceId = WorkspaceId([0x11; 32]);
const AGENT: AgentId = AgentId([0x22; 16]);
const SERVICE: ServiceId = ServiceId([0x33; 16]);
const IDENTITY: IdentityKey = IdentityKey([0x44; 32]);
const API_KEY: ApiKeyId = ApiKeyId([0x12; 16]);
const STREAM: StreamId = StreamId::FIRST;

fn signed<T: Body>(object: &T) -> Signed<T> {
    Signed::new(object.encode(), vec![(IDENTITY, Signature([0x55; 64]))])
        .expect("seeds are well-formed")
}

fn attributes() -> Attributes {
    Attributes::new([0x66; 16], vec!["db".to_owned(), "eu-1".to_owned()]).expect("both are tags")
}

fn certificate() -> Certificate {
    Certificate {
        workspace_id: WORKSPACE,
        identity_key: IDENTITY,
        role: AgentRole::Guest,
        attrs: attributes().hash(),
        serial: 1,
        not_after: Some(1_800_000_000),
        issuer: Issuer::Credential([0x77; 32]),
        services: Some(vec![SERVICE]),
    }
}

fn credential() -> Credential {
    Credential {
        workspace_id: WORKSPACE,
        kind: CredentialKind::Share,
        invite_key: IDENTITY,
        role: AgentRole::Guest,
        attrs: attributes().hash(),
        services: Some(vec![SERVICE]),
        uses: 1,
        join_until: 1_800_000_000,
        certs_end: 1_800_000_000,
        issuer: IDENTITY,
        wrap_key_hash: [0x88; 32],
    }
}

fn noise_key() -> NoiseKey {
    NoiseKey {
        workspace_id: WORKSPACE,
        agent_id: AGENT,
        suite: SUITE_1,
        counter: 0,
        static_key: StaticPublicKey([0x99; 32]),
        wrap_key_hash: [0x88; 32],
    }
}

fn objects() -> Vec<(&'static str, Vec<u8>)> {
    let genesis = Genesis {
        suite: SUITE_1,
        salt: [0xaa; 16],
        founders: vec![Founder { key: IDENTITY, role: SignerRole::Owner }],
        recovery_key: IDENTITY,
        epoch_commit: [0xbb; 32],
    };
    let service = ServiceRecord {
        workspace_id: WORKSPACE,
        service_id: SERVICE,
        agent_id: AGENT,
        counter: 1,
        epoch: 0,
        name: "prod-db".parse().expect("a name"),
        protocol: "postgres".to_owned(),
        certificate: signed(&certificate()),
        credential: Some(signed(&credential())),
        noise_key: signed(&noise_key()),
        port_hint: Some(5432),
        target_ok: Some(true),
    };
    let agent = AgentRecord {
        workspace_id: WORKSPACE,
        agent_id: AGENT,
        counter: 1,
        epoch: 0,
        label: "web-2".parse().expect("a label"),
        attrs: attributes(),
    };
    let beat = Beat {
        workspace_id: WORKSPACE,
        agent_id: AGENT,
        head: Head::genesis(WORKSPACE),
        time: 1_800_000_000,
    };
    vec![
        ("agent_record", signed(&agent).encode()),
        ("beat", signed(&beat).encode()),
        ("certificate", signed(&certificate()).encode()),
        ("credential", signed(&credential()).encode()),
        ("entry", signed(&entry()).encode()),
        ("genesis", signed(&genesis).encode()),
        ("noise_key", signed(&noise_key()).encode()),
        ("recovery", signed(&recovery()).encode()),
        ("service_record", signed(&service).encode()),
    ]
}

fn entry() -> Entry {
    let keep = vec![ObjectHash([1; 32]), ObjectHash([2; 32])];
    Entry {
        workspace_id: WORKSPACE,
        seq: 7,
        prev: EntryHash([3; 32]),
        time: 1_800_000_000,
        changes: vec![
            Change::AddSigner { key: IDENTITY, role: SignerRole::Admin },
            Change::RemoveSigner { key: IDENTITY, keep: keep.clone() },
            Change::RevokeAgent { agent_id: AGENT, below_serial: Some(2) },
            Change::CloseCredential { credential_id: CredentialId([4; 16]), keep },
            Change::EpochKey { epoch: 1, commit: [5; 32] },
            Change::Policy(Policy { strict: true }),
            Change::Unknown(127),
        ],
        abandons: vec![EntryHash([6; 32])],
    }
}

fn recovery() -> Recovery {
    Recovery {
        workspace_id: WORKSPACE,
        counter: 1,
        base: Head { seq: 6, hash: EntryHash([3; 32]) },
        signers: vec![Founder { key: IDENTITY, role: SignerRole::Owner }],
        recovery_key: IDENTITY,
        keep: vec![ObjectHash([1; 32])],
        time: 1_800_000_000,
    }
}

fn log_entries() -> Vec<(&'static str, Vec<u8>)> {
    let shortest = Entry { changes: vec![Change::Unknown(128)], abandons: Vec::new(), ..entry() };
    vec![
        ("entry", LogEntry::Entry(signed(&entry())).encode()),
        ("recovery", LogEntry::Recovery(signed(&recovery())).encode()),
        ("shortest", LogEntry::Entry(signed(&shortest)).encode()),
    ]
}

/// Four bytes are one thing that happens: see `trust_log.rs`.
fn trust_logs() -> Vec<(&'static str, Vec<u8>)> {
    let steps = |steps: &[[u8; 4]]| steps.concat();
    vec![
        ("every_change", steps(&[[0, 0, 1, 3], [0, 1, 2, 0x42], [0, 0, 6, 0], [0, 0, 0x35, 1]])),
        ("fork", steps(&[[0, 0, 10, 0], [2, 1, 3, 4], [5, 0, 0, 0], [6, 0, 0, 0]])),
        // Two owners remove each other; a recovery follows.
        (
            "thief",
            steps(&[
                [0, 0, 2, 1],
                [2, 1, 2, 0],
                [5, 0, 0, 0],
                [4, 0, 0, 0],
                [7, 0x80, 0, 2],
                [5, 0, 0, 0],
            ]),
        ),
        (
            "settled",
            steps(&[[0, 0, 10, 0], [2, 1, 2, 2], [5, 0, 0, 0], [0, 0x40, 10, 0], [6, 0, 0, 0]]),
        ),
        ("frozen", steps(&[[0, 0, 9, 9], [0, 0, 3, 1], [4, 0, 0, 0], [7, 0, 0, 0]])),
    ]
}

fn tunnel() -> TunnelRequest {
    TunnelRequest {
        tunnel_id: TunnelId([0xcc; 16]),
        service_id: SERVICE,
        responder: AGENT,
        share_id: CredentialId::NONE,
        channel_id: ChannelId([0xdd; 16]),
        tunnel_no: 0,
        encoding: Encoding::Base64,
        message: Blob(vec![0xee; 64]),
    }
}

/// One of each shape: ids, lists, numbers, enums, and what may be absent.
fn events() -> Vec<String> {
    let (agent_id, peer_id, service_id) = (AGENT, AgentId([0x23; 16]), SERVICE);
    let (tunnel_id, key_id) = (TunnelId([0xcc; 16]), API_KEY);
    let share = CredentialId([4; 16]);
    let address = "192.0.2.0/24".to_owned();
    let events = [
        Event::AuditExpired { through: 0 },
        Event::AgentEnrolled {
            agent_id,
            role: AgentRole::Guest,
            credential_id: Some(share),
            address,
        },
        Event::ShareCreated {
            agent_id,
            credential_id: share,
            service_ids: vec![service_id],
            certs_end: 1_800_000_000,
        },
        Event::TunnelRefused { agent_id, peer_id, service_id, code: ErrorCode::Offline, count: 2 },
        Event::TunnelClosed {
            agent_id,
            peer_id,
            service_id,
            tunnel_id,
            duration_ms: 1,
            bytes_from_agent: u64::MAX,
            bytes_from_peer: 0,
            reason: TunnelEnd::Cut,
        },
        Event::SignerAdded { key: IDENTITY, role: SignerRole::Owner, entry: 7 },
        Event::ApiKeyCreated {
            agent_id,
            key_id,
            scopes: vec![Scope::Read, Scope::Write],
            expires_at: 1_800_000_000,
        },
        Event::Unknown,
    ];
    let at = 1_800_000_000_000;
    events.into_iter().map(|event| Recorded { at, event }.encode()).collect()
}

fn audit_reply() -> FromHub {
    let base = AuditHead::EMPTY;
    let (mut head, mut rows) = (base, Vec::new());
    for event in events() {
        let seq = head.seq + 1;
        head = AuditHead { seq, hash: link(&WORKSPACE, &head.hash, seq, &event) };
        rows.push(AuditRow { seq, hash: head.hash, event });
    }
    FromHub::Reply { id: 6, reply: Reply::Audit { base, head, rows, more: false } }
}

fn audit_rows() -> Vec<(&'static str, String)> {
    vec![("events", events().join("\n")), ("reply", control::encode(&audit_reply()))]
}

fn control_frames() -> Vec<(&'static str, String)> {
    let nonce = Nonce([0xff; 32]);
    let authority = "127.0.0.1:7420".to_owned();
    let signature = Signature([0x55; 64]);
    let record = SealedRecord { epoch: 0, counter: 1, sealed: Blob(vec![0x0f; 280]) };
    let presented = PresentedBlobs {
        certificate: Blob(signed(&certificate()).encode()),
        credential: Some(Blob(signed(&credential()).encode())),
        noise_key: Blob(signed(&noise_key()).encode()),
    };
    let from_agent = [
        (
            "redeem",
            FromAgent::Redeem(Redeem {
                authority: authority.clone(),
                agent_nonce: nonce,
                workspace_id: WORKSPACE,
                invite_key: IDENTITY,
                signature,
            }),
        ),
        (
            "login",
            FromAgent::Login(Box::new(Login {
                authority,
                agent_nonce: nonce,
                session: SessionKind::Agent,
                workspace_id: WORKSPACE,
                presented,
                wrap_key: Blob(vec![0x0e; 32]),
                signature,
                create: None,
                moved: false,
            })),
        ),
        (
            "expose",
            FromAgent::Request {
                id: 1,
                request: Request::Expose {
                    service_id: SERVICE,
                    tag: LookupTag([0x0d; 16]),
                    record,
                    take_over: false,
                },
            },
        ),
        (
            "log",
            FromAgent::Request {
                id: 3,
                request: Request::Log { have: vec![Head::genesis(WORKSPACE)] },
            },
        ),
        (
            "append",
            FromAgent::Request {
                id: 4,
                request: Request::Append { entries: vec![Blob(log_entries()[2].1.clone())] },
            },
        ),
        (
            "store_wraps",
            FromAgent::Request {
                id: 5,
                request: Request::StoreWraps {
                    wraps: vec![AddressedWrap {
                        recipient: Recipient::Agent(AGENT),
                        wrap: EpochWrap { epoch: 1, sealed: Blob(vec![0x0b; 40]) },
                    }],
                },
            },
        ),
        ("open_tunnel", FromAgent::Request { id: 2, request: Request::OpenTunnel(tunnel()) }),
        (
            "audit",
            FromAgent::Request {
                id: 6,
                request: Request::Audit { after: 7, since: Some(1_800_000_000_000) },
            },
        ),
        (
            "create_api_key",
            FromAgent::Request {
                id: 7,
                request: Request::CreateApiKey {
                    scopes: vec![Scope::Read, Scope::Audit, Scope::Write],
                    valid_for: 3600,
                },
            },
        ),
        ("api_keys", FromAgent::Request { id: 8, request: Request::ApiKeys }),
        (
            "revoke_api_key",
            FromAgent::Request { id: 9, request: Request::RevokeApiKey { key_id: API_KEY } },
        ),
    ];
    let from_hub = [
        ("challenge", FromHub::Challenge { version: control::CONTROL_VERSION, nonce }),
        (
            "welcome",
            FromHub::Welcome {
                head: Head::genesis(WORKSPACE),
                encodings: vec![Encoding::Base64, Encoding::Binary],
                displaced: false,
            },
        ),
        (
            "incoming_tunnel",
            FromHub::IncomingTunnel {
                initiator: AGENT,
                request: tunnel(),
                ticket: Ticket::new([0x0c; 32]),
            },
        ),
        (
            "reply_log",
            FromHub::Reply {
                id: 3,
                reply: Reply::Log {
                    after: Head::genesis(WORKSPACE),
                    entries: vec![Blob(log_entries()[2].1.clone())],
                    more: true,
                },
            },
        ),
        ("reply_audit", audit_reply()),
        (
            "reply_beats",
            FromHub::Reply {
                id: 10,
                reply: Reply::Beats { beats: Vec::new(), audit: Some(AuditHead::EMPTY) },
            },
        ),
        (
            "reply_api_key_created",
            FromHub::Reply {
                id: 7,
                reply: Reply::ApiKeyCreated {
                    key: ApiKey::new([0x13; 32]),
                    key_id: API_KEY,
                    expires_at: 1_800_000_000,
                },
            },
        ),
        (
            "reply_api_keys",
            FromHub::Reply {
                id: 8,
                reply: Reply::ApiKeys {
                    keys: vec![ListedApiKey {
                        key_id: API_KEY,
                        agent_id: AGENT,
                        scopes: vec![Scope::Read],
                        created_at: 1_700_000_000,
                        expires_at: 1_800_000_000,
                        last_used_at: Some(1_750_000_000),
                    }],
                },
            },
        ),
        ("renewed", FromHub::Renewed { certificate: Blob(signed(&certificate()).encode()) }),
        (
            "reply_error",
            FromHub::Reply {
                id: 2,
                reply: Reply::Error(ErrorReport::new(
                    ErrorCode::Offline,
                    "the exposer has no session",
                )),
            },
        ),
    ];
    let agents = from_agent.into_iter().map(|(name, frame)| (name, control::encode(&frame)));
    agents
        .chain(from_hub.into_iter().map(|(name, frame)| (name, control::encode(&frame))))
        .collect()
}

fn records() -> Vec<(&'static str, Vec<u8>)> {
    let state =
        StreamState { stream: STREAM, received: 7, max_data: 1 << 18, end: Some(End::Fin(9)) };
    let progress = Progress {
        next_stream: STREAM.next().expect("the second"),
        max_data: 1 << 24,
        received: 7,
        streams: vec![state],
        more: false,
    };
    let mut entries = Vec::new();
    for (_, entry) in log_entries() {
        assert!(put_trust_entry(&mut entries, &entry), "the seeds fit one record");
    }
    let places = [9, 8, 1].map(|seq| Head { seq, hash: EntryHash([3; 32]) });
    let rekey = RekeyTry { number: 1, attempt: 2 };
    let records = [
        ("trust_get", Record::TrustGet(places.to_vec())),
        ("trust", Record::Trust { more: true, entries: &entries }),
        ("hello", Record::Hello { new: true, progress: progress.clone() }),
        ("welcome", Record::Welcome(progress)),
        ("open", Record::Open { stream: STREAM, purpose: Purpose::Check }),
        ("data", Record::Data { stream: STREAM, offset: 7, bytes: b"select 1;" }),
        ("window", Record::Window { stream: None, max_data: 1 << 25 }),
        ("fin", Record::Fin { stream: STREAM, total: 16 }),
        ("reset", Record::Reset { stream: STREAM, code: ResetCode::Busy, total: 16 }),
        ("ping", Record::Ping(42)),
        ("hs_want", Record::HsWant(1)),
        ("hs1", Record::Hs1 { rekey, message: &[0x0a; 128] }),
        ("hs2", Record::Hs2 { rekey, message: &[0x0b; 128] }),
        ("switch", Record::Switch(rekey)),
        ("tunnel_close", Record::TunnelClose(CloseCode::Other(99))),
    ];
    let encode = |record: Record<'_>| {
        let mut bytes = Vec::new();
        record.encode(&mut bytes);
        bytes
    };
    records.into_iter().map(|(name, record)| (name, encode(record))).collect()
}

fn check_reports() -> Vec<(&'static str, Vec<u8>)> {
    let text = |text| Printable::of(text).expect("printable");
    let refused = CheckReport {
        outcome: Outcome::Refused,
        resolved: Some(Resolved { addresses: 2, micros: 3100 }),
        connected_micros: None,
        protocol: Protocol::new("tcp").expect("a name"),
        detail: None,
        warning: None,
        tls: None,
    };
    let tls = TlsReport {
        version: text("TLS 1.3"),
        names: vec![text("db.internal")],
        not_before: Some(1),
        not_after: Some(1 << 40),
        name_matches: Some(true),
        trusted: Some(false),
    };
    let full = CheckReport {
        outcome: Outcome::Connected,
        connected_micros: Some(400),
        detail: Some(text("answers")),
        warning: Some(text("odd")),
        tls: Some(tls),
        ..refused.clone()
    };
    vec![("refused", refused.encode()), ("full", full.encode())]
}

fn main() -> io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let write = |target: &str, name: &str, seed: &[u8]| {
        let directory = corpus.join(target);
        fs::create_dir_all(&directory)?;
        fs::write(directory.join(name), seed)
    };
    for (name, seed) in objects() {
        write("signed_object", name, &seed)?;
    }
    for (name, seed) in log_entries() {
        write("log_entry", name, &seed)?;
    }
    for (name, seed) in trust_logs() {
        write("trust_log", name, &seed)?;
    }
    for (name, seed) in audit_rows() {
        write("audit_rows", name, seed.as_bytes())?;
    }
    for (name, seed) in control_frames() {
        write("control_frame", name, seed.as_bytes())?;
    }
    for (name, seed) in check_reports() {
        write("check_report", name, &seed)?;
    }
    for (name, seed) in records() {
        write("record_decode", name, &seed)?;
        let mut text = Vec::new();
        encode_base64(&seed, &mut text);
        write("base64_packet", name, &text)?;
        write("record_open", name, &[&[0], seed.as_slice()].concat())?;
    }
    write("record_open", "sealed", &[&[2], [0x5e; 40].as_slice()].concat())?;
    for (target, name, seed) in connect_fuzz::seeds() {
        write(target, name, &seed)?;
    }
    Ok(())
}
