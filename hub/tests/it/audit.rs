//! The audit log: what gets into it, that nothing gets out of it unseen, and who may touch it.

use std::{collections::BTreeMap, time::Duration};

use connect_hub::{
    audit::now,
    auth::unix_now,
    store::{AuditFilter, Store},
};
use connect_spec::{
    audit::{
        AuditFault, AuditHash, AuditHead, Chain, Event, Recorded, Scope, SeenHead, TunnelEnd, link,
    },
    control::{ErrorCode, FromAgent, FromHub, Reply, Request},
    encoding::Encoding,
    ids::{AgentId, LookupTag, ServiceId, TunnelId, WorkspaceId},
    log::{Change, Policy},
    objects::AgentRole,
};
use futures_util::{SinkExt as _, StreamExt as _};
use sqlx::{Connection as _, Executor as _, postgres::PgConnection};
use tokio_tungstenite::tungstenite::Message;

use crate::{
    client::{Control, expose},
    isolation::{A, B, enter, with_cluster},
    template::place,
    tunnels::{SERVICE, TAG, World, open},
};

/// All rows that the hub shows, which hold.
async fn read(control: &mut Control, workspace: WorkspaceId) -> Vec<Event> {
    let mut chain = None;
    let mut events = Vec::new();
    loop {
        let after = chain.as_ref().map_or(0, |chain: &Chain| chain.head().seq);
        let reply = control.request(Request::Audit { after, since: None }).await;
        let Reply::Audit { base, head, rows, more } = reply else {
            panic!("{reply:?}");
        };
        let chain = chain
            .get_or_insert_with(|| Chain::new(workspace, base, Vec::new(), unix_now()).unwrap());
        for row in &rows {
            events.push(chain.next(row).unwrap().event);
        }
        if !more {
            chain.check_end(head).unwrap();
            return events;
        }
    }
}

/// The same, once an event is there that is written a moment later.
async fn read_until(
    control: &mut Control,
    workspace: WorkspaceId,
    is_there: impl Fn(&Event) -> bool,
) -> Vec<Event> {
    loop {
        let events = read(control, workspace).await;
        if events.iter().any(&is_there) {
            return events;
        }
    }
}

#[tokio::test]
async fn what_happens_is_recorded_in_its_order() {
    let (_dir, data_dir) = place().await;
    let mut world = World::start(&data_dir).await;
    let workspace = world.workspace.id;
    let (exposer, reacher) = (world.exposer.id, Request::Beats { mine: None });
    let Reply::Beats { audit: Some(first), .. } = world.reaching.request(reacher).await else {
        panic!("a member hears where the log ends");
    };

    let (mut near, mut far) = world.tunnel(Encoding::Binary).await;
    near.send(Message::binary(vec![1; 1000])).await.unwrap();
    assert_eq!(far.next().await.unwrap().unwrap().len(), 1000);
    far.send(Message::binary(vec![1; 10])).await.unwrap();
    assert_eq!(near.next().await.unwrap().unwrap().len(), 10);
    near.close(None).await.unwrap();
    far.next().await.unwrap().unwrap();
    drop((near, far));

    // One that the exposer refuses, and many to a service that is not there.
    let refused = open(200, SERVICE, exposer);
    world.reaching.ask(Request::OpenTunnel(refused.clone())).await;
    assert!(matches!(world.exposing.receive().await, FromHub::IncomingTunnel { .. }));
    let no = FromAgent::RefuseTunnel { tunnel_id: refused.tunnel_id, code: ErrorCode::Forbidden };
    world.exposing.send(no).await;
    assert!(matches!(world.reaching.receive().await, FromHub::Reply { .. }));
    let unknown = ServiceId([0xee; 16]);
    for number in 0..5 {
        let request = open(201 + number, unknown, exposer);
        assert_eq!(world.reaching.refused(Request::OpenTunnel(request)).await, ErrorCode::NotFound);
    }

    let invite = world.workspace.invite(3, None);
    world.exposing.done(invite.request()).await;
    let share = world.workspace.share(SERVICE);
    world.exposing.done(share.request()).await;
    let joiner = world.workspace.joiner(&invite);
    let guest = world.workspace.joiner(&share);
    let _joined = Control::log_in(world.hub.agents, &world.workspace, &joiner).await;
    let mut guesting = Control::log_in(world.hub.agents, &world.workspace, &guest).await;
    assert_eq!(
        guesting.refused(Request::Audit { after: 0, since: None }).await,
        ErrorCode::Forbidden
    );

    let scopes = vec![Scope::Read, Scope::Audit];
    let create = Request::CreateApiKey { scopes: scopes.clone(), valid_for: 60 };
    let Reply::ApiKeyCreated { key_id, expires_at, .. } = world.reaching.request(create).await
    else {
        panic!("a member makes keys");
    };
    world.exposing.done(Request::RevokeApiKey { key_id }).await;
    world.exposing.done(expose(SERVICE, TAG, 2)).await;
    world.exposing.done(expose(ServiceId([0xd3; 16]), LookupTag([0xd3; 16]), 1)).await;
    world.exposing.done(Request::Unexpose { service_id: SERVICE }).await;
    let entry = world.workspace.entry(
        world.workspace.head(),
        vec![
            Change::Policy(Policy { strict: true }),
            Change::RevokeAgent { agent_id: joiner.id, below_serial: None },
        ],
    );
    assert_eq!(world.exposing.append(&[entry]).await, Reply::Done);

    let reacher = world.reacher.id;
    let events = read_until(&mut world.reaching, workspace, |event| {
        matches!(event, Event::TunnelRefused { code: ErrorCode::NotFound, count: 5, .. })
    })
    .await;
    let address = || "127.0.0.0/24".to_owned();
    let enrolled = |agent_id, role, credential_id| Event::AgentEnrolled {
        agent_id,
        role,
        credential_id,
        address: address(),
    };
    let of_session = [
        Event::WorkspaceCreated { agent_id: exposer, by_token: false, address: address() },
        enrolled(exposer, AgentRole::Member, None),
        enrolled(reacher, AgentRole::Member, None),
        Event::ServiceExposed { agent_id: exposer, service_id: SERVICE },
        Event::InviteCreated {
            agent_id: exposer,
            credential_id: invite.id(),
            uses: 3,
            join_until: invite.credential.object().join_until,
        },
        Event::ShareCreated {
            agent_id: exposer,
            credential_id: share.id(),
            service_ids: vec![SERVICE],
            certs_end: share.credential.object().certs_end,
        },
        enrolled(joiner.id, AgentRole::Member, Some(invite.id())),
        enrolled(guest.id, AgentRole::Guest, Some(share.id())),
        Event::ApiKeyCreated { agent_id: reacher, key_id, scopes, expires_at },
        Event::ApiKeyRevoked { agent_id: exposer, key_id },
        Event::ServiceExposed { agent_id: exposer, service_id: ServiceId([0xd3; 16]) },
        Event::ServiceUnexposed { agent_id: exposer, service_id: SERVICE },
        Event::PolicySet { strict: true, entry: 1 },
        Event::AgentRevoked { agent_id: joiner.id, entry: 1, below_serial: None },
    ];
    let is_tunnel = |event: &Event| {
        matches!(
            event,
            Event::TunnelOpened { .. } | Event::TunnelClosed { .. } | Event::TunnelRefused { .. }
        )
    };
    let (of_tunnels, others): (Vec<_>, Vec<_>) = events.into_iter().partition(is_tunnel);
    assert_eq!(others, of_session);
    let parties = (reacher, exposer, SERVICE, TunnelId([1; 16]));
    match of_tunnels.as_slice() {
        [
            Event::TunnelOpened { agent_id, peer_id, service_id, tunnel_id, share_id: None },
            Event::TunnelClosed {
                agent_id: closed_agent,
                tunnel_id: closed_tunnel,
                bytes_from_agent: 1000,
                bytes_from_peer: 10,
                reason: TunnelEnd::ReacherClosed,
                ..
            },
            rest @ ..,
        ] => {
            assert_eq!((*agent_id, *peer_id, *service_id, *tunnel_id), parties);
            assert_eq!((closed_agent, closed_tunnel), (agent_id, tunnel_id));
            let refusal = |service_id, code, count| Event::TunnelRefused {
                agent_id: reacher,
                peer_id: exposer,
                service_id,
                code,
                count,
            };
            assert_eq!(
                rest,
                [
                    refusal(SERVICE, ErrorCode::Forbidden, 1),
                    refusal(unknown, ErrorCode::NotFound, 5)
                ]
            );
        }
        other => panic!("{other:?}"),
    }
    // Four rows were there when the tunnel was opened.
    assert_eq!(first.seq, 4);
    // A connection of the pool may find its database stopped just before it; that is a warning of the pool.
    let log = world.hub.stop().await;
    assert!(!log.contains(" ERROR "), "{log}");
}

#[tokio::test]
async fn a_refused_login_is_recorded_for_agents_that_are_known_only() {
    let (_dir, data_dir) = place().await;
    let mut world = World::start(&data_dir).await;
    let workspace = world.workspace.id;
    let mut clone = world.exposer.clone();
    clone.static_key = [0x66; 32];
    for _ in 0..3 {
        let mut control = Control::connect(world.hub.agents).await;
        let refusal = control.try_log_in(&clone, |_| ()).await;
        assert_eq!(crate::client::error_code(refusal), ErrorCode::Clone);
    }
    // One that nobody here ever saw, with a certificate of its own making.
    let stranger = crate::client::Workspace::new();
    let mut unknown = stranger.founder();
    unknown.workspace = workspace;
    let mut control = Control::connect(world.hub.agents).await;
    assert!(matches!(control.try_log_in(&unknown, |_| ()).await, FromHub::Error(_)));

    let is_refusal = |event: &Event| matches!(event, Event::LoginRefused { .. });
    let counted = async {
        loop {
            let events = read_until(&mut world.reaching, workspace, is_refusal).await;
            let refusals: Vec<_> = events.into_iter().filter(is_refusal).collect();
            let count = |event: &Event| match event {
                Event::LoginRefused { agent_id, code: ErrorCode::Clone, count, .. }
                    if *agent_id == world.exposer.id =>
                {
                    *count
                }
                other => panic!("{other:?}"),
            };
            if refusals.iter().map(count).sum::<u64>() == 3 {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), counted).await.unwrap();
    world.hub.stop().await;
}

fn event(number: u64) -> Recorded {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&number.to_be_bytes());
    now(Event::ServiceExposed { agent_id: AgentId(id), service_id: SERVICE })
}

const ROWS: u64 = 40;

async fn fill(store: &Store, workspace: WorkspaceId) {
    let mut tx = store.workspace(workspace).await.unwrap();
    assert!(tx.insert_workspace(b"genesis").await.unwrap());
    let events: Vec<_> = (0..ROWS).map(event).collect();
    tx.record(&events).await.unwrap();
    tx.commit().await.unwrap();
}

/// Reads the log as the hub does for an agent, and judges it as the agent does.
async fn verify(store: &Store, seen: Vec<AuditHead>) -> Result<AuditHead, AuditFault> {
    let mut tx = store.snapshot(A).await.unwrap();
    let bounds = tx.audit_bounds().await.unwrap();
    let rows = tx.audit_rows(&AuditFilter::default(), 1000).await.unwrap();
    let seen = seen.into_iter().map(|head| SeenHead { head, at: 0 }).collect();
    let mut chain = Chain::new(A, bounds.base, seen, unix_now())?;
    for row in &rows {
        chain.next(row)?;
    }
    chain.check_end(bounds.head)?;
    Ok(chain.head())
}

/// A number below `below` that looks random; the same in each run.
fn draw(state: &mut u64, below: u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) % below
}

/// One edit of the log of workspace A, and what an agent that remembers row 20 and the last must find.
fn edit(state: &mut u64, events: &BTreeMap<u64, (AuditHash, String)>) -> (String, AuditFault) {
    use AuditFault::{Beyond, Changed, Missing, Removed, Rewritten};
    let a = format!("workspace_id = '\\x{A}'");
    let row = 1 + draw(state, ROWS);
    let (hash, text) = &events[&row];
    let set = |seq: u64, event: &str| {
        format!("UPDATE connect.audit_events SET event = '{event}' WHERE {a} AND seq = {seq};")
    };
    match draw(state, 13) {
        0 => {
            // Any character may be another.
            let at = text.find("\"agent_id\":\"").unwrap()
                + 12
                + usize::try_from(draw(state, 32)).unwrap();
            let old = &text[at..=at];
            let other = if old == "f" { "e" } else { "f" };
            (set(row, &format!("{}{other}{}", &text[..at], &text[at + 1..])), Changed(row))
        }
        1 => (set(row, &format!("{text} ")), Changed(row)),
        2 => {
            let mut other = hash.0;
            other[usize::try_from(draw(state, 32)).unwrap()] ^= 1 << draw(state, 8);
            let sql = format!(
                "UPDATE connect.audit_events SET hash = '\\x{}' WHERE {a} AND seq = {row};",
                AuditHash(other)
            );
            (sql, Changed(row))
        }
        3 => (format!("DELETE FROM connect.audit_events WHERE {a} AND seq = {row};"), Missing(row)),
        4 => {
            let other = 1 + (row + draw(state, ROWS - 1)) % ROWS;
            let sql = set(row, &events[&other].1) + &set(other, text);
            (sql, Changed(row.min(other)))
        }
        5 => {
            (format!("DELETE FROM connect.audit_events WHERE {a} AND seq >= {row};"), Missing(row))
        }
        6 => (format!("DELETE FROM connect.audit_events WHERE {a} AND seq <= {row};"), Missing(1)),
        7 => {
            let sql = format!(
                "DELETE FROM connect.audit_events WHERE {a} AND seq <= {row};
                 UPDATE connect.audit_heads SET base_seq = {row}, base_hash = '\\x{hash}' WHERE {a};"
            );
            (sql, Removed(row))
        }
        8 => {
            let forged = event(99).encode();
            let last = link(&A, &events[&ROWS].0, ROWS + 1, &forged);
            let sql = format!(
                "INSERT INTO connect.audit_events (workspace_id, seq, hash, event)
                 VALUES ('\\x{A}', {}, '\\x{last}', '{forged}');",
                ROWS + 1
            );
            (sql, Beyond(ROWS + 1))
        }
        9 => {
            let sql = format!(
                "UPDATE connect.audit_events SET seq = seq + {} WHERE {a} AND seq = {row};",
                ROWS + 5
            );
            (sql, Missing(row))
        }
        10 => {
            // The row of another workspace in place of this one's.
            let sql = format!(
                "DELETE FROM connect.audit_events WHERE {a} AND seq = {row};
                 UPDATE connect.audit_events SET workspace_id = '\\x{A}'
                 WHERE workspace_id = '\\x{B}' AND seq = {row};"
            );
            (sql, Changed(row))
        }
        11 => {
            // The log ends earlier, and says so.
            let last = row.max(2) - 1;
            let sql = format!(
                "DELETE FROM connect.audit_events WHERE {a} AND seq > {last};
                 UPDATE connect.audit_heads SET seq = {last}, hash = '\\x{}' WHERE {a};",
                events[&last].0
            );
            (sql, AuditFault::Shortened(if last < 20 { 20 } else { ROWS }))
        }
        _ => {
            // From a row on, all is written anew, so that it holds in itself.
            let mut sql = String::new();
            let mut previous = events.get(&(row - 1)).map_or(AuditHash([0; 32]), |(hash, _)| *hash);
            for seq in row..=ROWS {
                let forged = if seq == row { event(500).encode() } else { events[&seq].1.clone() };
                previous = link(&A, &previous, seq, &forged);
                sql.push_str(&format!(
                    "UPDATE connect.audit_events SET event = '{forged}', hash = '\\x{previous}'
                     WHERE {a} AND seq = {seq};"
                ));
            }
            sql.push_str(&format!(
                "UPDATE connect.audit_heads SET hash = '\\x{previous}' WHERE {a};"
            ));
            (sql, Rewritten(if row <= 20 { 20 } else { ROWS }))
        }
    }
}

#[tokio::test]
async fn of_a_thousand_edits_by_the_owner_each_is_found_where_it_is() {
    with_cluster(|owner, app| async move {
        let store = Store::connect(app).await.unwrap();
        fill(&store, A).await;
        fill(&store, B).await;
        let mut owner = PgConnection::connect_with(&owner).await.unwrap();
        owner
            .execute(
                "SET synchronous_commit = off;
                 CREATE TEMP TABLE events AS SELECT workspace_id, seq, hash, event FROM connect.audit_events;
                 CREATE TEMP TABLE heads AS SELECT * FROM connect.audit_heads",
            )
            .await
            .unwrap();
        let whole = verify(&store, Vec::new()).await.unwrap();
        let mut tx = store.snapshot(A).await.unwrap();
        let rows = tx.audit_rows(&AuditFilter::default(), 1000).await.unwrap();
        drop(tx);
        let events: BTreeMap<_, _> =
            rows.into_iter().map(|row| (row.seq, (row.hash, row.event))).collect();
        let seen = vec![AuditHead { seq: 20, hash: events[&20].0 }, whole];

        let mut state = 7;
        for number in 0..1000 {
            let (sql, expected) = edit(&mut state, &events);
            owner.execute(sqlx::AssertSqlSafe(sql.clone())).await.unwrap();
            assert_eq!(verify(&store, seen.clone()).await, Err(expected), "{number}: {sql}");
            owner
                .execute(
                    "TRUNCATE connect.audit_events; DELETE FROM connect.audit_heads;
                     INSERT INTO connect.audit_heads SELECT * FROM heads;
                     INSERT INTO connect.audit_events (workspace_id, seq, hash, event) SELECT * FROM events",
                )
                .await
                .unwrap();
        }
        assert_eq!(verify(&store, seen).await, Ok(whole));
    })
    .await;
}

#[tokio::test]
async fn the_hub_itself_can_only_append() {
    with_cluster(|_, app| async move {
        let store = Store::connect(app.clone()).await.unwrap();
        fill(&store, A).await;
        let mut session = PgConnection::connect_with(&app).await.unwrap();
        for sql in [
            "UPDATE connect.audit_events SET event = '{}'",
            "UPDATE connect.audit_events SET seq = seq + 1",
            "DELETE FROM connect.audit_events",
            "TRUNCATE connect.audit_events",
            "INSERT INTO connect.audit_events (workspace_id, seq, hash, event)
             SELECT workspace_id, 999, hash, event FROM connect.audit_events LIMIT 1",
            "UPDATE connect.audit_heads SET seq = 0",
            "DELETE FROM connect.audit_heads",
            "INSERT INTO connect.audit_heads (workspace_id) VALUES ('\\x00')",
            "SELECT connect.audit_link('', '', 1, '')",
            "SELECT connect.expire_audit(interval '29 days')",
            "SELECT connect.expire_audit(NULL)",
            "SET LOCAL ROLE connect_audit",
        ] {
            let mut tx = enter(&mut session, A).await;
            let refused = tx.execute(sql).await.unwrap_err().to_string();
            let expected = if sql.contains("expire") { "30 days" } else { "permission denied" };
            assert!(refused.contains(expected), "{sql}: {refused}");
        }
        // Without a workspace, and into none that is not there.
        let nowhere = session.execute("SELECT connect.append_audit(ARRAY['{}'])").await;
        assert!(nowhere.unwrap_err().to_string().contains("no workspace"));
        let mut tx = enter(&mut session, B).await;
        tx.execute("SELECT connect.append_audit(ARRAY['{\"at\":1,\"kind\":\"x\"}'])")
            .await
            .unwrap_err();
        drop(tx);
        // What is no event is no row.
        for garbage in ["", "{}", "nonsense", "{\"at\":\"soon\",\"kind\":\"x\"}"] {
            let mut tx = enter(&mut session, A).await;
            let append = sqlx::query("SELECT connect.append_audit(ARRAY[$1])").bind(garbage);
            append.execute(&mut *tx).await.unwrap_err();
        }
        assert_eq!(verify(&store, Vec::new()).await.unwrap().seq, ROWS);
    })
    .await;
}

#[tokio::test]
async fn rows_expire_and_the_chain_holds() {
    with_cluster(|_, app| async move {
        const DAY: Duration = Duration::from_secs(24 * 3600);
        let store = Store::connect(app).await.unwrap();
        let day = u64::try_from(DAY.as_millis()).unwrap();
        let aged = |days: u64| {
            let mut recorded = event(days);
            recorded.at -= days * day;
            recorded
        };
        let mut seen = Vec::new();
        for workspace in [A, B] {
            let mut tx = store.workspace(workspace).await.unwrap();
            assert!(tx.insert_workspace(b"genesis").await.unwrap());
            // The hub's clock was wrong once: a young row keeps the older ones after it.
            let ages: &[u64] = if workspace == A { &[100, 90, 50, 10, 60, 0] } else { &[20, 10] };
            for days in ages {
                tx.record(&[aged(*days)]).await.unwrap();
                if workspace == A {
                    seen.push(tx.audit_bounds().await.unwrap().head);
                }
            }
            tx.commit().await.unwrap();
        }
        assert_eq!(store.expire_audit(365 * DAY).await.unwrap(), 0);
        assert_eq!(store.expire_audit(40 * DAY).await.unwrap(), 3);
        let head = verify(&store, seen.clone()).await.unwrap();
        assert_eq!(head.seq, 7);
        let mut tx = store.snapshot(A).await.unwrap();
        let bounds = tx.audit_bounds().await.unwrap();
        assert_eq!(bounds.base, seen[2]);
        let rows = tx.audit_rows(&AuditFilter::default(), 10).await.unwrap();
        drop(tx);
        let numbers: Vec<u64> = rows.iter().map(|row| row.seq).collect();
        assert_eq!(numbers, [4, 5, 6, 7]);
        let last: Recorded = serde_json::from_str(&rows[3].event).unwrap();
        assert_eq!(last.event, Event::AuditExpired { through: 3 });
        assert_eq!(last.encode(), rows[3].event);
        // Nothing more to do, and the other workspace was not touched.
        assert_eq!(store.expire_audit(40 * DAY).await.unwrap(), 0);
        assert_eq!(verify(&store, seen).await.unwrap(), head);
        let mut tx = store.snapshot(B).await.unwrap();
        assert_eq!(tx.audit_bounds().await.unwrap().head.seq, 2);
    })
    .await;
}
