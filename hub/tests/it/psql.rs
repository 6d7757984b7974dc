//! What somebody sees who has the hub's own connection to the database and a real `psql`, beside a hub
//! that serves two workspaces. Who knows the id of a workspace can enter it: that is what the hub does.
//! Nobody learns an id, a row, or whether there is one, without.

use std::{fmt::Write as _, path::Path, process::Stdio};

use connect_hub::cluster::{client_program, connect_options};
use connect_spec::{
    control::Request,
    ids::{LookupTag, ServiceId},
};
use sqlx::{Connection as _, postgres::PgConnection};
use tokio::process::Command;

use crate::{
    client::{Control, Workspace, expose, record},
    process::HubProcess,
    template::place,
};

const SERVICE: ServiceId = ServiceId([0xd1; 16]);
const TAG: LookupTag = LookupTag([0xd2; 16]);

/// What must come out.
#[derive(Debug, Clone, Copy)]
enum Seen {
    /// These lines, and no complaint.
    Lines(&'static str),
    /// A complaint that says this, and no line.
    Refused(&'static str),
    /// Whatever does not name anything of the other workspace.
    NothingForeign,
}
use Seen::{Lines, NothingForeign, Refused};

/// Statements, with `{a}` for the id of the workspace that is probed, `{agent}` for its agent, `{b}` for a
/// workspace that the prober knows; each begins in a session of its own.
const PROBES: &[(&str, Seen)] = &[
    // No context, an empty one, one that means nothing, one of nobody.
    ("SELECT count(*) FROM connect.workspaces", Lines("0")),
    ("SELECT count(*) FROM connect.agents", Lines("0")),
    ("SELECT count(*) FROM connect.services", Lines("0")),
    ("SELECT count(*) FROM connect.credentials", Lines("0")),
    ("SELECT count(*) FROM connect.wraps", Lines("0")),
    ("SELECT count(*) FROM connect.log_entries", Lines("0")),
    ("SET connect.workspace_id = ''; SELECT count(*) FROM connect.agents", Lines("0")),
    ("SET connect.workspace_id = 'zz'; SELECT count(*) FROM connect.agents", Refused("invalid hexadecimal")),
    ("SET connect.workspace_id = '%'; SELECT count(*) FROM connect.agents", Refused("invalid hexadecimal")),
    (
        "SET connect.workspace_id = '0000000000000000000000000000000000000000000000000000000000000000';
         SELECT count(*) FROM connect.agents",
        Lines("0"),
    ),
    ("SET connect.workspace_id = '{b}'; SELECT count(*) FROM connect.agents", Lines("1")),
    (
        "SET connect.workspace_id = '{b}';
         SELECT count(*) FROM connect.agents WHERE workspace_id = decode('{a}', 'hex')
            OR agent_id = decode('{agent}', 'hex') OR true",
        Lines("1"),
    ),
    (
        "SET connect.workspace_id = '{b}';
         SELECT count(*) FROM connect.agents a RIGHT JOIN (SELECT decode('{agent}', 'hex') AS id) x
         ON a.agent_id = x.id WHERE a.agent_id IS NOT NULL",
        Lines("0"),
    ),
    // What a request leaves behind on its connection.
    (
        "BEGIN; SELECT set_config('connect.workspace_id', '{b}', true) \\g /dev/null
         COMMIT; SELECT count(*), current_setting('connect.workspace_id') = '' FROM connect.agents",
        Lines("0|t"),
    ),
    (
        "BEGIN; SELECT set_config('connect.workspace_id', '{b}', true) \\g /dev/null
         ROLLBACK; SELECT count(*) FROM connect.agents",
        Lines("0"),
    ),
    // Even a setting that was left for the session gives way to that of a transaction.
    (
        "SELECT set_config('connect.workspace_id', '{b}', false) \\g /dev/null
         BEGIN; SELECT set_config('connect.workspace_id', repeat('00', 32), true) \\g /dev/null
         SELECT count(*) FROM connect.agents; COMMIT",
        Lines("0"),
    ),
    // Other roles.
    ("SET ROLE connect_lookup", Refused("permission denied to set role")),
    ("SET ROLE connect_backup", Refused("permission denied to set role")),
    ("SET ROLE postgres", Refused("permission denied to set role")),
    ("SET SESSION AUTHORIZATION connect_backup", Refused("permission denied to set session authorization")),
    ("SET SESSION AUTHORIZATION postgres", Refused("permission denied to set session authorization")),
    ("ALTER ROLE connect_app BYPASSRLS", Refused("")),
    ("GRANT connect_backup TO connect_app", Refused("")),
    ("CREATE ROLE mine", Refused("permission denied to create role")),
    ("CREATE ROLE mine BYPASSRLS", Refused("")),
    // The lock itself.
    ("SET row_security = off; SELECT count(*) FROM connect.agents", Refused("would be affected by row-level security")),
    ("ALTER TABLE connect.agents DISABLE ROW LEVEL SECURITY", Refused("must be owner")),
    ("ALTER TABLE connect.agents NO FORCE ROW LEVEL SECURITY", Refused("must be owner")),
    ("CREATE POLICY mine ON connect.agents USING (true)", Refused("must be owner")),
    ("DROP POLICY workspace_select ON connect.agents", Refused("must be owner")),
    ("GRANT SELECT ON connect.registration_tokens TO connect_app", Refused("permission denied")),
    ("CALL connect.isolate('connect.agents')", Refused("permission denied")),
    ("SELECT * FROM connect.registration_tokens", Refused("permission denied")),
    ("DELETE FROM connect.agents", Refused("permission denied")),
    ("TRUNCATE connect.agents", Refused("permission denied")),
    ("UPDATE connect.schema_history SET version = 0", Refused("permission denied")),
    ("CREATE TABLE connect.mine (id int)", Refused("permission denied for schema connect")),
    ("CREATE RULE mine AS ON SELECT TO connect.agents DO INSTEAD SELECT 1", Refused("must be owner")),
    (
        "CREATE FUNCTION pg_temp.t() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
         CREATE TRIGGER mine AFTER INSERT ON connect.agents EXECUTE FUNCTION pg_temp.t()",
        Refused("permission denied"),
    ),
    ("CREATE TEMP TABLE heir () INHERITS (connect.agents)", Refused("must be owner")),
    ("CREATE TEMP TABLE t (id bytea REFERENCES connect.workspaces)", Refused("temporary tables may reference only")),
    // Roundabout ways to a row.
    ("SELECT count(*) FROM connect.agents WHERE ctid = '(0,1)'", Lines("0")),
    ("SELECT count(*) FROM connect.agents TABLESAMPLE SYSTEM (100)", Lines("0")),
    ("SELECT count(*) FROM (SELECT FROM connect.agents FOR UPDATE) x", Lines("0")),
    ("UPDATE connect.agents SET last_address = last_address RETURNING agent_id", Lines("")),
    ("DELETE FROM connect.services RETURNING service_id", Lines("")),
    ("COPY connect.agents TO STDOUT", Lines("")),
    ("COPY (TABLE connect.agents) TO STDOUT", Lines("")),
    ("COPY connect.agents TO '/tmp/agents'", Refused("")),
    ("COPY connect.agents TO PROGRAM 'cat'", Refused("")),
    ("SELECT lo_import('/etc/passwd')", Refused("permission denied")),
    ("SELECT lo_export(lo_create(0), '/tmp/x')", Refused("permission denied")),
    ("SELECT pg_read_file('postmaster.pid')", Refused("permission denied")),
    ("SELECT * FROM pg_ls_dir('base')", Refused("permission denied")),
    ("CREATE EXTENSION pageinspect", Refused("")),
    ("CREATE EXTENSION dblink", Refused("")),
    ("SELECT xmlagg(query_to_xml('TABLE connect.agents', true, false, ''))::text ~ 'row'", NothingForeign),
    (
        "BEGIN; DECLARE c CURSOR FOR SELECT * FROM connect.agents;
         SELECT set_config('connect.workspace_id', '{b}', true) \\g /dev/null
         COMMIT; FETCH ALL FROM c",
        Refused("does not exist"),
    ),
    (
        "BEGIN; SELECT set_config('connect.workspace_id', '{b}', true) \\g /dev/null
         PREPARE p AS SELECT count(*) FROM connect.agents; EXECUTE p; EXECUTE p; EXECUTE p; EXECUTE p; EXECUTE p;
         EXECUTE p; COMMIT; EXECUTE p; SET connect.workspace_id = ''; EXECUTE p",
        Lines("1\n1\n1\n1\n1\n1\n0\n0"),
    ),
    ("CREATE TEMP TABLE t AS TABLE connect.agents; SELECT count(*) FROM t", Lines("0")),
    ("CREATE TEMP VIEW v AS TABLE connect.agents; SELECT count(*) FROM v", Lines("0")),
    // Functions, operators and tables of one's own before those that policies and functions mean.
    (
        "CREATE FUNCTION pg_temp.current_setting(text, boolean) RETURNS text LANGUAGE sql AS $$SELECT '{b}'$$;
         CREATE FUNCTION pg_temp.decode(text, text) RETURNS bytea LANGUAGE sql AS $$SELECT ''::bytea$$;
         CREATE FUNCTION pg_temp.yes(bytea, bytea) RETURNS boolean LANGUAGE sql AS 'SELECT true';
         CREATE OPERATOR pg_temp.= (LEFTARG = bytea, RIGHTARG = bytea, FUNCTION = pg_temp.yes);
         SET search_path = pg_temp, pg_catalog; SELECT count(*) FROM connect.agents",
        Lines("0"),
    ),
    (
        "CREATE TEMP TABLE registration_tokens (token_hash bytea, expires_at timestamptz, used_at timestamptz);
         INSERT INTO registration_tokens VALUES ('x', 'infinity', NULL); SET search_path = pg_temp, connect;
         SELECT connect.spend_registration_token('x')",
        Lines("f"),
    ),
    (
        "CREATE FUNCTION pg_temp.tell(bytea) RETURNS boolean COST 0.0000001 LANGUAGE plpgsql
         AS $$BEGIN RAISE NOTICE 'saw %', $1; RETURN true; END$$;
         SELECT count(*) FROM connect.agents WHERE pg_temp.tell(agent_id)",
        Lines("0"),
    ),
    (
        "SELECT count(*) FROM connect.agents WHERE 1 / (octet_length(agent_id) - 16) = 0",
        Lines("0"),
    ),
    // What statistics, plans and the server's views tell.
    ("SELECT count(*) FROM pg_stats WHERE schemaname = 'connect' AND tablename <> 'schema_history'", Lines("0")),
    ("SELECT * FROM pg_statistic", Refused("permission denied")),
    ("SELECT * FROM pg_stats_ext_exprs, pg_stats_ext", NothingForeign),
    ("SELECT * FROM pg_stat_activity", NothingForeign),
    ("SELECT * FROM pg_locks", NothingForeign),
    ("SELECT * FROM pg_settings WHERE name ~ 'connect'", NothingForeign),
    // Totals over all workspaces are no secret from this role, and say nothing of one.
    ("EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF) SELECT * FROM connect.agents", NothingForeign),
    ("EXPLAIN SELECT * FROM connect.agents WHERE workspace_id = decode('{a}', 'hex')", NothingForeign),
    ("SELECT relname, reltuples, relpages FROM pg_class WHERE relnamespace = 'connect'::regnamespace", NothingForeign),
    // Channels between sessions: the hub uses none of them.
    ("SELECT pg_notification_queue_usage(); LISTEN connect; NOTIFY connect, 'mine'", NothingForeign),
    ("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'", Lines("0")),
];

/// Inserts whose answer must not depend on whether the row is there in another workspace: the same with
/// ids that exist and with ids that do not.
const COLLISIONS: &[&str] = &[
    "INSERT INTO connect.workspaces (workspace_id, genesis, head_hash) VALUES ({W}, '', {W})",
    "INSERT INTO connect.workspaces (workspace_id, genesis, head_hash) VALUES ({W}, '', {W}) ON CONFLICT DO NOTHING",
    "INSERT INTO connect.workspaces (workspace_id, genesis, head_hash) VALUES ({W}, '', {W})
     ON CONFLICT (workspace_id) DO UPDATE SET head_seq = 1",
    "INSERT INTO connect.wraps (workspace_id, epoch, agent_id, wrap) VALUES ({W}, 0, {A}, '')",
    "INSERT INTO connect.services (workspace_id, service_id, agent_id, tag, record_epoch, record_counter, record)
     VALUES ({W}, {S}, {A}, {T}, 0, 1, '')",
    // In the prober's own workspace, with ids of the other one.
    "INSERT INTO connect.wraps (workspace_id, epoch, agent_id, wrap) VALUES ({B}, 0, {A}, '')",
    "INSERT INTO connect.services (workspace_id, service_id, agent_id, tag, record_epoch, record_counter, record)
     VALUES ({B}, {S}, {A}, {T}, 0, 1, '')",
    "INSERT INTO connect.services (workspace_id, service_id, agent_id, tag, record_epoch, record_counter, record)
     SELECT workspace_id, {S}, agent_id, {T}, 0, 1, '' FROM connect.agents RETURNING 'exposed'",
    "UPDATE connect.agents SET agent_id = {A} RETURNING 'renamed'",
    "UPDATE connect.agents SET workspace_id = {W}",
    "UPDATE connect.services SET record_counter = 9 WHERE service_id = {S}",
    "SELECT 1 FROM connect.agents WHERE agent_id = {A} FOR KEY SHARE",
];

/// Runs each script in a session of its own; gives what it printed and what it complained about.
async fn psql(data_dir: &Path, scripts: &[String]) -> Vec<(String, String)> {
    let options = connect_options(data_dir, "connect_app").unwrap();
    let mut input = String::new();
    for script in scripts {
        write!(input, "\\connect -\n\\echo ===\n\\warn ===\n{script};\n").unwrap();
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), input).unwrap();
    let output = Command::new(client_program("psql", 0).await.unwrap())
        .args(["-X", "-q", "-A", "-t", "-U", "connect_app", "-d", "connect", "-h"])
        .arg(options.get_socket().unwrap())
        .arg("-f")
        .arg(file.path())
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    let parts = |bytes: &[u8]| -> Vec<String> {
        let text = String::from_utf8_lossy(bytes).into_owned();
        text.split("===\n").skip(1).map(|part| part.trim().to_owned()).collect()
    };
    let (printed, complained) = (parts(&output.stdout), parts(&output.stderr));
    assert_eq!((printed.len(), complained.len()), (scripts.len(), scripts.len()));
    printed.into_iter().zip(complained).collect()
}

#[tokio::test]
async fn the_hubs_own_role_learns_nothing_of_a_workspace_that_it_does_not_know() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let (probed, own) = (Workspace::new(), Workspace::new());
    let (agent, other) = (probed.founder(), own.founder());
    let mut control = Control::log_in(hub.agents, &probed, &agent).await;
    control.done(expose(SERVICE, TAG, 1)).await;
    control.done(probed.invite(1, None).request()).await;
    let _own = Control::log_in(hub.agents, &own, &other).await;
    let superuser = connect_options(&data_dir, "postgres").unwrap();
    let mut superuser = PgConnection::connect_with(&superuser).await.unwrap();
    sqlx::query("ANALYZE").execute(&mut superuser).await.unwrap();

    let fill = |sql: &str| {
        sql.replace("{a}", &probed.id.to_string())
            .replace("{b}", &own.id.to_string())
            .replace("{agent}", &hex::encode(agent.id.0))
    };
    let scripts: Vec<String> = PROBES.iter().map(|(sql, _)| fill(sql)).collect();
    let foreign = [
        probed.id.to_string(),
        hex::encode(agent.id.0),
        hex::encode(SERVICE.0),
        hex::encode(TAG.0),
    ];
    let mut surprises = Vec::new();
    for ((sql, seen), (printed, complained)) in PROBES.iter().zip(psql(&data_dir, &scripts).await) {
        // What the prober wrote itself may come back.
        let tells = foreign
            .iter()
            .filter(|secret| !fill(sql).contains(secret.as_str()))
            .any(|secret| printed.contains(secret) || complained.contains(secret));
        let as_expected = match seen {
            Lines(lines) => printed == *lines && complained.is_empty(),
            Refused(why) => {
                complained.contains("ERROR") && complained.contains(why) && printed.is_empty()
            }
            NothingForeign => true,
        };
        if tells || !as_expected {
            surprises.push(format!("{sql}\n=> {printed:?} {complained:?}, expected {seen:?}"));
        }
    }
    assert!(surprises.is_empty(), "{}", surprises.join("\n\n"));

    // The hub works on while all that goes on, and its own rows are where they were.
    control.done(Request::PublishAgent { record: record(1) }).await;
    hub.stop().await;
}

#[tokio::test]
async fn a_collision_with_another_workspace_looks_like_none() {
    let (_dir, data_dir) = place().await;
    let hub = HubProcess::start(&data_dir).await;
    let (probed, own) = (Workspace::new(), Workspace::new());
    let agent = probed.founder();
    let mut control = Control::log_in(hub.agents, &probed, &agent).await;
    control.done(expose(SERVICE, TAG, 1)).await;
    let _own = Control::log_in(hub.agents, &own, &own.founder()).await;

    let bytes = |id: &[u8]| format!("decode('{}', 'hex')", hex::encode(id));
    let there = [&probed.id.0[..], &agent.id.0, &SERVICE.0, &TAG.0];
    let nowhere = [&[0xee; 32][..], &[0xee; 16], &[0xee; 16], &[0xee; 16]];
    let script = |sql: &str, ids: [&[u8]; 4]| {
        let mut sql = sql.replace("{B}", &bytes(&own.id.0));
        for (name, id) in ["{W}", "{A}", "{S}", "{T}"].into_iter().zip(ids) {
            sql = sql.replace(name, &bytes(id));
        }
        format!("SET connect.workspace_id = '{}'; BEGIN; {sql}; ROLLBACK", own.id)
    };
    let scripts: Vec<String> =
        COLLISIONS.iter().flat_map(|sql| [script(sql, there), script(sql, nowhere)]).collect();
    let masked = |(printed, complained): &(String, String)| {
        let mut text = format!("{printed}\n{complained}");
        for id in there.iter().chain(&nowhere) {
            text = text.replace(&hex::encode(id), "ID");
        }
        // The place in the script, before the words.
        text.lines()
            .map(|line| {
                line.split_once(": ")
                    .filter(|(at, _)| at.starts_with("psql"))
                    .map_or(line, |(_, said)| said)
            })
            .collect::<Vec<_>>()
            .join("\n")
    };
    let answers = psql(&data_dir, &scripts).await;
    for (sql, pair) in COLLISIONS.iter().zip(answers.chunks(2)) {
        let [there, nowhere] = pair else { panic!() };
        assert_eq!(masked(there), masked(nowhere), "{sql}");
        assert!(!there.1.contains("duplicate key"), "{sql}: {}", there.1);
    }
    hub.stop().await;
}
