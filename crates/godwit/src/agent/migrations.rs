//! Following migrations to their end, and what the agent does then.
//!
//! A worker does the migration. The agent listens to its events, keeps the newest in memory for whoever asks, and when
//! the worker has ended puts the host in order:
//!
//! | role | completed | else |
//! |---|---|---|
//! | source | QEMU is made sure to be gone, TAPs are removed; spec and token record stay, so that `vm run` names the holder | what is open is settled (`recovery`); the target is told |
//! | target | the machine is this host's | QEMU is killed, TAPs and directory go; a token record stays, so that the epoch is never accepted again |
//!
//! An unsettled source keeps its paused QEMU: it may yet be asked to go on. `recovery` asks until it is answered.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
    sync::watch,
    time::{sleep, timeout},
};
use tracing::Instrument;

use super::{
    Agent,
    error::{AgentError, Refusal},
    launch, machines,
    machines::Claim,
    metrics::UnderWay,
    ownership::{self, Holder},
    recovery, state, workers,
};
use crate::{
    api::{Finding, FindingState, Migration},
    job::{self, Command, Event, Happening, Job, Outcome, Phase, Progress, Report, Role},
    token::Store,
    whole_file,
};

/// Finished migrations that are kept.
const FINISHED_MAX: usize = 100;
/// How often a worker that doesn't listen yet is tried again.
const RETRY: Duration = Duration::from_millis(20);
/// How long a worker may take to take a command.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection stays open after a command was written.
const LINGER: Duration = Duration::from_secs(2);
/// How long the source's QEMU may take to quit after the machine went.
const QUIT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long what a worker left open is tried before the report says "unsettled"; later tries go on behind it.
const SETTLE_FOR: Duration = Duration::from_secs(10);
const SETTLE_EVERY: Duration = Duration::from_millis(500);
/// The longest event of a worker.
const EVENT_BYTES_MAX: u64 = 1 << 20;

/// The migrations under way.
#[derive(Debug, Default)]
pub(super) struct Migrations {
    under_way: Mutex<BTreeMap<String, Tracked>>,
    /// Reports of migrations that are over for which the disk had no room yet.
    unwritten: Mutex<BTreeMap<String, Report>>,
}

#[derive(Debug)]
struct Tracked {
    job: Job,
    news: watch::Sender<News>,
}

/// The newest of a migration.
#[derive(Debug, Clone)]
pub(super) struct News {
    /// The worker takes connections.
    pub(super) ready: bool,
    phase: Phase,
    progress: Progress,
    /// It is over.
    pub(super) report: Option<Report>,
}

impl Default for News {
    fn default() -> Self {
        Self { ready: false, phase: Phase::Preparing, progress: Progress::default(), report: None }
    }
}

impl Migrations {
    /// The migration that a machine is in.
    pub(super) fn of_machine(&self, machine: &str) -> Option<Job> {
        self.lock()
            .values()
            .find(|tracked| tracked.job.spec.name == machine)
            .map(|tracked| tracked.job.clone())
    }

    /// How many are under way.
    pub(super) fn count(&self) -> usize {
        self.lock().len()
    }

    /// The jobs of those that are under way.
    pub(super) fn jobs(&self) -> Vec<Job> {
        self.lock().values().map(|tracked| tracked.job.clone()).collect()
    }

    /// How those stand that are under way.
    pub(super) fn under_way(&self) -> Vec<UnderWay> {
        let tracked = self.lock();
        let view = |Tracked { job, news }: &Tracked| UnderWay {
            machine: job.spec.name.clone(),
            peer: job.peer.clone(),
            role: job.role,
            progress: news.borrow().progress.clone(),
        };
        tracked.values().map(view).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Tracked>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unwritten(&self) -> MutexGuard<'_, BTreeMap<String, Report>> {
        self.unwritten.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self, id: &str) -> Option<watch::Receiver<News>> {
        self.lock().get(id).map(|tracked| tracked.news.subscribe())
    }
}

impl Agent {
    /// Writes the job, starts its worker and follows it; the machine stays claimed until the end.
    pub(super) fn begin(
        self: &Arc<Self>,
        job: Job,
        claim: Claim,
    ) -> Result<watch::Receiver<News>, AgentError> {
        let directory = self.state.migration(&job.id);
        state::write_job(&directory, &job)?;
        if let Err(error) = workers::spawn(&directory, &job.id) {
            let _ = fs::remove_dir_all(&directory);
            return Err(error);
        }
        Ok(self.follow(job, claim))
    }

    /// Takes up the migrations that were under way when the last agent ended.
    pub(super) fn resume_migrations(self: &Arc<Self>) {
        for id in self.state.migrations().unwrap_or_default() {
            let directory = self.state.migration(&id);
            if !directory.join(job::JOB_FILE).exists() {
                // The last agent died while it wrote the job down; nothing had begun.
                let _ = fs::remove_dir_all(&directory);
                continue;
            }
            if directory.join(job::REPORT_FILE).exists() {
                tokio::spawn(self.clone().close_ended(id));
                continue;
            }
            let resumed = state::read_json::<Job>(&directory.join(job::JOB_FILE))
                .map_err(AgentError::from)
                .and_then(|job| Ok((self.busy.claim(&job.spec.name, &doing(&job))?, job)));
            match resumed {
                Ok((claim, job)) => drop(self.follow(job, claim)),
                Err(error) => tracing::warn!(migration = id, %error, "can't be taken up"),
            }
        }
    }

    /// Deals with a migration that ended while no agent was there to see it; its worker's socket says that none was.
    async fn close_ended(self: Arc<Self>, id: String) {
        let directory = self.state.migration(&id);
        let was_seen = !directory.join(job::WORKER_SOCKET).exists();
        workers::clear(&directory).await;
        if let Some(report) = self.report(&id).filter(|_| !was_seen) {
            self.metrics.count(&report);
        }
    }

    /// All migrations that are remembered, the newest first.
    pub(super) fn list_migrations(&self) -> Result<Vec<Migration>, AgentError> {
        let mut dated: Vec<(SystemTime, Migration)> = Vec::new();
        for id in self.state.migrations()? {
            let written =
                fs::metadata(self.state.migration(&id).join(job::JOB_FILE)).and_then(|it| it.modified());
            if let (Ok(written), Ok(migration)) = (written, self.show_migration(&id)) {
                dated.push((written, migration));
            }
        }
        dated.sort_by_key(|(written, _)| std::cmp::Reverse(*written));
        Ok(dated.into_iter().map(|(_, migration)| migration).collect())
    }

    /// One migration.
    pub(super) fn show_migration(&self, id: &str) -> Result<Migration, AgentError> {
        let directory = self.state.migration(self.existing(id)?);
        let job: Job = state::read_json(&directory.join(job::JOB_FILE))?;
        let news = match self.migrations.watch(id) {
            Some(news) => news.borrow().clone(),
            None => News { phase: Phase::Done, report: self.report(id), ..News::default() },
        };
        let News { phase, progress, report, .. } = news;
        Ok(Migration {
            id: job.id,
            machine: job.spec.name,
            role: job.role,
            peer: job.peer,
            phase,
            progress,
            forecast: job.forecast,
            report,
        })
    }

    /// Tells the worker of a migration something.
    pub(super) async fn command(&self, id: &str, command: &Command) -> Result<Migration, AgentError> {
        let directory = self.state.migration(self.existing(id)?);
        if directory.join(job::REPORT_FILE).exists() {
            return Err(Refusal::Over.into());
        }
        let say = async {
            let mut worker = reach(&directory).await?;
            let mut line = serde_json::to_vec(command)?;
            line.push(b'\n');
            worker.write_all(&line).await?;
            // The worker answers by events; reading one proves that it serves this connection.
            let mut first = [0];
            worker.read_exact(&mut first).await?;
            Ok::<_, std::io::Error>(worker)
        };
        let said = timeout(COMMAND_TIMEOUT, say).await.unwrap_or_else(|late| Err(late.into()));
        let mut worker = said.map_err(|error| AgentError::Worker(format!("can't be reached: {error}")))?;
        // A worker that sees its client leave may not read what the client said last.
        tokio::spawn(
            async move { timeout(LINGER, tokio::io::copy(&mut worker, &mut tokio::io::sink())).await },
        );
        self.show_migration(id)
    }

    /// The id of a migration that is remembered; nothing else may become a path.
    pub(super) fn existing<'a>(&self, id: &'a str) -> Result<&'a str, AgentError> {
        let exists = is_id(id) && self.state.migration(id).join(job::JOB_FILE).exists();
        exists.then_some(id).ok_or_else(|| AgentError::NotFound { what: "migration", name: id.to_owned() })
    }

    fn follow(self: &Arc<Self>, job: Job, claim: Claim) -> watch::Receiver<News> {
        let (news, receiver) = watch::channel(News::default());
        self.migrations.lock().insert(job.id.clone(), Tracked { job: job.clone(), news: news.clone() });
        let span = tracing::info_span!("migration", id = job.id, machine = job.spec.name, role = ?job.role);
        let agent = self.clone();
        let follow = async move {
            tracing::info!(peer = job.peer, "begins");
            let report = agent.listen(&job, &news).await;
            tracing::info!(outcome = ?report.outcome, detail = report.detail, "ended");
            let report = agent.put_in_order(&job, report).await;
            let rate_bytes_per_second = news.borrow().progress.rate_bytes_per_second;
            agent.remember(&job, &report, rate_bytes_per_second);
            agent.migrations.lock().remove(&job.id);
            drop(claim);
            news.send_modify(|news| news.report = Some(report.clone()));
            workers::clear(&agent.state.migration(&job.id)).await;
            // From here on the next agent takes it for counted.
            agent.metrics.count(&report);
            agent.forget_the_oldest();
        };
        tokio::spawn(follow.instrument(span));
        receiver
    }

    /// Listens to the worker until it has ended; its report, or, of a worker that died without one, what its hand-over
    /// came to when the agent settled it.
    async fn listen(&self, job: &Job, news: &watch::Sender<News>) -> Report {
        let directory = self.state.migration(&job.id);
        loop {
            let alive = workers::is_alive(&directory);
            if let Ok(stream) = UnixStream::connect(directory.join(job::WORKER_SOCKET)).await {
                take_events(stream, news).await;
            }
            if let Ok(report) = state::read_json(&directory.join(job::REPORT_FILE)) {
                return report;
            }
            if !alive {
                let finding = self.settle(&job.spec.name, Some(job)).await;
                return self.report_without_worker(job, &directory, &finding);
            }
            sleep(RETRY).await;
        }
    }

    /// The worker died without a report: the token record says where the machine is.
    fn report_without_worker(&self, job: &Job, directory: &Path, finding: &Finding) -> Report {
        let here = self.config.name.to_string();
        let holder = ownership::of(&self.state.machine(&job.spec.name)).map(|it| it.holder);
        let (outcome, at) = match (job.role, holder) {
            _ if finding.state != FindingState::Settled => (Outcome::Unsettled, None),
            (Role::Source, Ok(Holder::Here)) => (Outcome::Failed, Some(here)),
            (Role::Source, Ok(Holder::Peer(peer))) => (Outcome::Completed, Some(peer)),
            (Role::Target, Ok(Holder::Here)) if self.has_record(job) => (Outcome::Completed, Some(here)),
            (Role::Target, Ok(_)) => (Outcome::Failed, Some(job.peer.clone())),
            (_, Ok(Holder::Unsettled(_)) | Err(_)) => (Outcome::Unsettled, None),
        };
        let words = workers::last_words(directory).map(|words| format!(" (its last words: {words})"));
        let detail = format!("the worker died{}; the agent: {}", words.unwrap_or_default(), finding.did);
        let report = Report { detail: Some(detail), machine_is_at: at, ..job.report(outcome) };
        self.keep_report(report.clone());
        report
    }

    /// The report of a migration that is over; the newest, written or not.
    pub(super) fn report(&self, id: &str) -> Option<Report> {
        let unwritten = self.migrations.unwritten().get(id).cloned();
        unwritten.or_else(|| state::read_json(&self.state.migration(id).join(job::REPORT_FILE)).ok())
    }

    /// Writes a report, now or when there is room.
    pub(super) fn keep_report(&self, report: Report) {
        self.migrations.unwritten().insert(report.id.clone(), report);
        self.write_reports();
    }

    /// Writes the reports for which the disk had no room before.
    pub(super) fn write_reports(&self) {
        self.migrations.unwritten().retain(|id, report| {
            let written = state::write_json(&self.state.migration(id).join(job::REPORT_FILE), report);
            written.inspect_err(|error| tracing::warn!(migration = id, %error, "no report written")).is_err()
        });
    }

    fn has_record(&self, job: &Job) -> bool {
        Store::open(self.state.machine(&job.spec.name).path()).load().is_ok_and(|record| record.is_some())
    }

    /// Puts the host in order after a worker's end. Returns the report as it is then: what the worker had to leave open
    /// may be settled by now.
    async fn put_in_order(&self, job: &Job, mut report: Report) -> Report {
        let name = &job.spec.name;
        let machine = self.state.machine(name);
        let mut is_settled = true;
        if report.outcome != Outcome::Completed {
            (report, is_settled) = self.settle_rest(job, report).await;
        }
        match (job.role, report.outcome) {
            (Role::Source, Outcome::Completed) => {
                if let Ok(Some(running)) = machine.running() {
                    if !machines::ends_within(&running, QUIT_TIMEOUT).await {
                        tracing::warn!(pid = running.process.pid, "QEMU didn't quit; killed");
                        running.process.kill();
                    }
                    launch::clear(&machine).await;
                }
            }
            // The workers may have lost each other; the target must not wait for what won't come.
            (Role::Source, Outcome::Cancelled | Outcome::Failed) => {
                if let Ok(peer) = self.find_receiver(&job.peer).await {
                    self.withdraw(&peer, &job.id).await;
                }
            }
            (Role::Target, Outcome::Cancelled | Outcome::Failed) if is_settled => {
                let refused = ownership::of(&machine).is_ok_and(|known| known.holder != Holder::Here);
                if refused || !self.has_record(job) {
                    self.abandon(name).await;
                }
            }
            (Role::Target, Outcome::Completed) => machine.set_started(),
            _ => {}
        }
        report
    }

    /// Settles what a worker left open, with some patience for a peer that still decides.
    async fn settle_rest(&self, job: &Job, report: Report) -> (Report, bool) {
        let give_up_at = Instant::now() + SETTLE_FOR;
        loop {
            let finding = self.settle(&job.spec.name, None).await;
            let is_settled = finding.state == FindingState::Settled;
            // Of a machine that never got as far as a record nothing is known here.
            if is_settled
                && self.has_record(job)
                && let Some(corrected) = recovery::corrected(report.clone(), &finding)
            {
                self.keep_report(corrected.clone());
                return (corrected, true);
            }
            if is_settled || Instant::now() >= give_up_at {
                return (report, is_settled);
            }
            sleep(SETTLE_EVERY).await;
        }
    }

    /// Undoes starts and arrivals that an agent which died left half done, once nothing of them is open any more; also
    /// what it was just writing.
    pub(super) async fn undo_unfinished_starts(&self) {
        for (name, machine) in self.state.known_machines().unwrap_or_default() {
            let Ok(_claim) = self.busy.claim(&name, "a start that wasn't finished is being undone") else {
                continue;
            };
            whole_file::sweep(machine.path());
            let Some(starting) = machine.starting() else { continue };
            if recovery::is_open(&machine) {
                continue;
            }
            let known = Store::open(machine.path()).load().ok().flatten().is_some();
            let is_here = ownership::of(&machine).is_ok_and(|it| it.holder == Holder::Here);
            match starting.incoming {
                true if known && is_here => machine.set_started(),
                true => {
                    tracing::info!(machine = name, "never arrived; removed");
                    launch::undo(&machine, &starting).await;
                    self.abandon(&name).await;
                }
                false => launch::undo(&machine, &starting).await,
            }
        }
    }

    /// Removes a machine that didn't arrive; only its token record stays.
    pub(super) async fn abandon(&self, name: &str) {
        let machine = self.state.machine(name);
        if let Ok(Some(running)) = machine.running() {
            running.process.kill();
            machines::ends_within(&running, QUIT_TIMEOUT).await;
        }
        launch::clear(&machine).await;
        if let Err(error) = machine.remove_all_but_token() {
            tracing::warn!(machine = name, %error, "not removed");
        }
    }

    /// Keeps the newest [`FINISHED_MAX`] finished migrations.
    fn forget_the_oldest(&self) {
        let Ok(migrations) = self.list_migrations() else { return };
        for old in migrations.iter().filter(|migration| migration.report.is_some()).skip(FINISHED_MAX) {
            let _ = fs::remove_dir_all(self.state.migration(&old.id));
        }
    }
}

/// What a machine's claim says while it migrates.
pub(super) fn doing(job: &Job) -> String {
    let direction = if job.role == Role::Source { "migrates to" } else { "arrives from" };
    format!("it {direction} {} (godwit cancel {})", job.peer, job.id)
}

/// Whether this is how ids look: 16 hexadecimal digits.
pub(super) fn is_id(id: &str) -> bool {
    id.len() == 16 && id.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// Connects to a worker; one that was just started may not listen yet.
async fn reach(directory: &Path) -> std::io::Result<UnixStream> {
    loop {
        match UnixStream::connect(directory.join(job::WORKER_SOCKET)).await {
            Err(_) if workers::is_alive(directory) => sleep(RETRY).await,
            reached => return reached,
        }
    }
}

/// Takes events until the worker closes the connection.
async fn take_events(stream: UnixStream, news: &watch::Sender<News>) {
    let mut lines = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        match (&mut lines).take(EVENT_BYTES_MAX).read_until(b'\n', &mut line).await {
            Ok(read) if read > 0 && line.ends_with(b"\n") => {}
            _ => return,
        }
        match serde_json::from_slice::<Event>(&line) {
            Ok(event) => news.send_modify(|news| apply(news, event.what)),
            Err(error) => tracing::warn!(%error, "the worker's event makes no sense"),
        }
    }
}

fn apply(news: &mut News, what: Happening) {
    match what {
        Happening::Ready => news.ready = true,
        Happening::Phase { phase } => news.phase = phase,
        Happening::Progress(progress) => news.progress = progress,
        Happening::Warning { message } => tracing::warn!("{message}"),
        // The report counts once the host is in order.
        Happening::Finished(_) => news.phase = Phase::Done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ids_become_paths() {
        assert!(is_id("0123456789abcdef"));
        for other in
            ["", "..", "0123456789abcde", "0123456789ABCDEF", "../../etc/passwd", "0123456789abcdef/"]
        {
            assert!(!is_id(other), "{other}");
        }
    }

    #[test]
    fn news_follow_the_events() {
        let mut news = News::default();
        apply(&mut news, Happening::Ready);
        apply(&mut news, Happening::Phase { phase: Phase::PreCopy });
        assert!(news.ready && news.phase == Phase::PreCopy && news.report.is_none());
    }
}
