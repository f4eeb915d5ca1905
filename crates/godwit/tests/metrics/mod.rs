//! What an operator sees from outside: metrics, the watch over all migrations, and logs.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    os::unix::{fs::MetadataExt, net::UnixStream},
    process::{Child, ChildStdout, Command, Stdio},
};

use serde_json::{Value, json};

use crate::{
    host::{Host, Site, eventually, free_port, kill_pid},
    pair, peer,
};

const GODWIT: &str = env!("CARGO_BIN_EXE_godwit");
/// So slow that a migration doesn't end before it is told to.
const FOR_EVER: [&str; 6] = ["migrate", "web1", "--to", "hostb", "--bandwidth", "1kbit"];

/// Head and body of the answer to a request.
fn get(mut stream: impl Read + Write, path: &str) -> (String, String) {
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_lowercase(), body.to_owned())
}

/// The host's page of metrics.
fn page(host: &Host) -> String {
    let (head, body) = get(UnixStream::connect(host.socket()).unwrap(), "/v1/metrics");
    assert!(head.contains(" 200 ok") && head.contains("application/openmetrics-text"), "{head}");
    assert!(body.ends_with("# EOF\n"), "{body}");
    body
}

/// The value of a series, if there is one.
fn value(page: &str, series: &str) -> Option<f64> {
    page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

/// The sum over all series of a name.
fn sum(page: &str, name: &str) -> f64 {
    let start = format!("{name}{{");
    page.lines()
        .filter(|line| line.starts_with(&start))
        .filter_map(|it| it.rsplit_once(' '))
        .map(|(_, it)| it.parse::<f64>().unwrap())
        .sum()
}

fn ended(host: &Host, role: &str, outcome: &str) -> f64 {
    let series = format!("godwit_migrations_total{{role={role:?},outcome={outcome:?}}}");
    value(&page(host), &series).unwrap()
}

fn both() -> (Site, Host, Host) {
    let site = Site::new();
    let (a, b) = pair(&site, "may_receive = true", "may_send = true");
    // More pages than may wait to leave, so that some are owed while nothing does.
    a.godwit(&["vm", "run", &a.spec_of("web1", "256M", "")]).succeeds();
    (site, a, b)
}

fn begin_for_ever(host: &Host) -> String {
    let migration = host.godwit(&[&FOR_EVER[..], &["--detach"]].concat()).succeeds();
    migration["id"].as_str().unwrap().to_owned()
}

#[test]
fn metrics_follow_a_migration_and_an_agents_restart() {
    let (_site, mut a, b) = both();
    assert_eq!(value(&page(&a), r#"godwit_machines{state="running"}"#), Some(1.0));
    let id = begin_for_ever(&a);
    let owed = r#"godwit_migration_pages_owed{machine="web1",peer="hostb"}"#;
    eventually("pages are owed", || value(&page(&a), owed).is_some_and(|pages| pages > 0.0));
    a.crash();
    a.start();
    eventually("the next agent says so as well", || value(&page(&a), owed).is_some_and(|pages| pages > 0.0));
    assert_eq!(value(&page(&a), r#"godwit_migrations_under_way{role="source"}"#), Some(1.0));
    assert_eq!(value(&page(&b), r#"godwit_migrations_under_way{role="target"}"#), Some(1.0));

    a.godwit(&["cancel", &id]).succeeds();
    eventually("it is counted", || ended(&a, "source", "cancelled") == 1.0);
    eventually("also at the target", || sum(&page(&b), "godwit_migrations_total") == 1.0);
    let page = page(&a);
    assert_eq!(sum(&page, "godwit_migrations_total"), 1.0);
    assert_eq!(value(&page, "godwit_migration_downtime_seconds_count"), Some(0.0));
    assert!(!page.contains(r#"machine="web1""#), "{page}");
}

#[test]
fn a_completed_migration_is_in_the_totals_as_in_its_report() {
    let (_site, a, b) = both();
    let report = a.godwit(&["migrate", "web1", "--to", "hostb"]).succeeds();
    eventually("it is counted", || ended(&a, "source", "completed") == 1.0);
    eventually("also at the target", || ended(&b, "target", "completed") == 1.0);
    let page_of_a = page(&a);
    assert_eq!(value(&page_of_a, "godwit_migration_wire_bytes_total"), report["wire_bytes"].as_f64());
    let forms = report["techniques"].as_object().unwrap().iter();
    let pages: f64 =
        forms.filter(|(form, _)| form.ends_with("_pages")).filter_map(|(_, it)| it.as_f64()).sum();
    assert!(pages > 0.0, "{report}");
    assert_eq!(sum(&page_of_a, "godwit_migration_pages_total"), pages);
    assert_eq!(value(&page_of_a, "godwit_migration_downtime_seconds_count"), Some(1.0));
    let total_s = report["total_ms"].as_f64().unwrap() / 1e3;
    assert_eq!(value(&page_of_a, r#"godwit_migration_duration_seconds_sum{role="source"}"#), Some(total_s));
    assert_eq!(value(&page(&b), "godwit_migration_wire_bytes_total"), Some(0.0));
}

#[test]
fn a_migration_that_ends_while_the_agent_is_away_is_counted_once_by_the_next() {
    let (_site, mut a, _b) = both();
    let id = begin_for_ever(&a);
    a.crash();
    let directory = a.state().join("migrations").join(&id);
    let mut worker = UnixStream::connect(directory.join("worker.sock")).unwrap();
    worker.write_all(b"{\"command\":\"cancel\"}\n").unwrap();
    eventually("it is over", || directory.join("report.json").exists());
    a.start();
    eventually("it is counted", || ended(&a, "source", "cancelled") == 1.0);
    a.crash();
    assert!(!directory.join("worker.sock").exists(), "by this the next agent knows that it was counted");
    a.start();
    assert_eq!(ended(&a, "source", "cancelled"), 0.0, "an agent's counters begin with it");
}

#[test]
fn a_worker_that_is_killed_is_counted_as_what_its_agent_made_of_it() {
    let (_site, a, _b) = both();
    let id = begin_for_ever(&a);
    let process = fs::read_to_string(a.state().join("migrations").join(&id).join("worker.json")).unwrap();
    kill_pid(serde_json::from_str::<Value>(&process).unwrap()["pid"].as_i64().unwrap());
    eventually("it is counted", || ended(&a, "source", "failed") == 1.0);
    assert_eq!(a.machine("web1", "state"), json!("running"));
}

#[test]
fn metrics_over_tcp_are_the_same_page_and_nothing_else() {
    let site = Site::new();
    let port = free_port();
    let host = site.host("hosta", 0, &format!("metrics_listen = \"127.0.0.1:{port}\""));
    let over_tcp = |path| get(TcpStream::connect(("127.0.0.1", port)).unwrap(), path);
    let (head, body) = over_tcp("/metrics");
    assert!(head.contains(" 200 ok") && head.contains("application/openmetrics-text"), "{head}");
    assert_eq!(body, page(&host));
    for path in ["/", "/v1/metrics", "/v1/machines", "/v1/openapi.json"] {
        assert!(over_tcp(path).0.contains(" 404 "), "{path}");
    }
}

/// `godwit status --watch`, with standard output to be read.
fn watch(host: &Host, json: &[&str]) -> (Child, BufReader<ChildStdout>) {
    let mut command = Command::new(GODWIT);
    command.arg("--socket").arg(host.socket()).args(["status", "--watch"]).args(json);
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let said = BufReader::new(child.stdout.take().unwrap());
    (child, said)
}

fn next_line(said: &mut impl BufRead) -> String {
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    line
}

#[test]
fn a_watch_over_all_migrations_ends_with_them() {
    let (_site, a, b) = both();
    let (mut idle, mut said) = watch(&a, &["--json"]);
    assert_eq!(next_line(&mut said), "", "none is under way");
    assert!(idle.wait().unwrap().success());

    let id = begin_for_ever(&a);
    let (mut at_a, mut lines) = watch(&a, &[]);
    let (mut at_b, mut objects) = watch(&b, &["--json"]);
    assert!(next_line(&mut lines).starts_with("web1 to hostb: "));
    let first: Value = serde_json::from_str(&next_line(&mut objects)).unwrap();
    assert_eq!((&first["id"], &first["report"]), (&json!(id), &Value::Null));
    a.godwit(&["cancel", &id]).succeeds();
    let rest: Vec<String> = lines.lines().map(Result::unwrap).collect();
    assert!(rest.iter().any(|line| line.starts_with("web1 to hostb: cancelled")), "{rest:?}");
    assert_eq!(at_a.wait().unwrap().code(), Some(7));
    let last: Value = serde_json::from_str(&objects.lines().last().unwrap().unwrap()).unwrap();
    assert_eq!((&last["id"], &last["role"]), (&json!(id), &json!("target")));
    assert!(last["report"]["outcome"].is_string(), "{last}");
    assert!(!at_b.wait().unwrap().success());
}

#[test]
fn logs_name_the_migration_and_leave_the_time_to_the_journal() {
    let site = Site::new();
    let ports = [free_port(), free_port()];
    let mut a = site.host("hosta", ports[0], &peer("hostb", ports[1], "may_receive = true"));
    let _b = site.host("hostb", ports[1], &peer("hosta", ports[0], "may_send = true"));
    a.crash();
    let journal = site.path("journal");
    let file = fs::File::create(&journal).unwrap();
    let metadata = file.metadata().unwrap();
    let mut agent = Command::new(GODWIT)
        .args(["agent", "--config"])
        .arg(&a.config)
        .env("JOURNAL_STREAM", format!("{}:{}", metadata.dev(), metadata.ino()))
        .stderr(file)
        .spawn()
        .unwrap();
    eventually("the agent answers", || UnixStream::connect(a.socket()).is_ok());
    a.godwit(&["vm", "run", &a.spec("web1", "")]).succeeds();
    let report = a.godwit(&["migrate", "web1", "--to", "hostb"]).succeeds();
    agent.kill().unwrap();
    agent.wait().unwrap();

    let id = report["id"].as_str().unwrap();
    let text = fs::read_to_string(&journal).unwrap();
    assert!(
        text.lines().all(|line| line.starts_with("<6> INFO ") || line.starts_with("<4> WARN ")),
        "{text}"
    );
    assert!(!text.contains('\u{1b}'), "{text}");
    for said in ["begins", "ended"] {
        assert!(text.lines().any(|line| line.contains(said) && line.contains(id)), "{said}: {text}");
    }
    let worker = fs::read_to_string(a.state().join("migrations").join(id).join("worker.log")).unwrap();
    assert!(worker.lines().count() >= 2, "{worker}");
    for line in worker.lines() {
        assert!(line.starts_with("20") && line.contains(id) && line.contains("web1"), "{line:?}");
    }
}
