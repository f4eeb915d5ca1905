//! Guests seen from outside while a contender moves them: the first of them closely.

use std::{
    net::Ipv4Addr,
    process::Command,
    thread::sleep,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, bail};
use godwit_sim::{
    beats::{Beat, BeatRecorder},
    lab::{FIRST_GUEST_ADDRESS, Lab, Place, Process, WireBytes},
    observer::{BeatListener, Progress},
    web_client::WebClient,
};

use super::{Account, Forecast, Load, Outcome, Responses, Stage, guest_address};

/// Where the guest is.
pub(crate) const GUEST_ADDRESS: Ipv4Addr = FIRST_GUEST_ADDRESS;
/// How long the guest's pace is watched before anything happens to it.
const BEFORE: Duration = Duration::from_secs(5);
/// How long a guest's answers are watched where it has more of a processor than before.
const AFTER_BURST: Duration = Duration::from_secs(5);
/// What shares the guest's core: named like a guest's processor, so that [`super::cores`] gives it that core.
const CROWD: &str = "echo 'CPU crowd' > /proc/self/comm; while :; do :; done";
/// The same of a build, whose pieces are big.
const BEFORE_BUILD: Duration = Duration::from_secs(20);
/// How long it is watched afterwards, so that its silence is seen to end and the last acknowledgements are counted.
const AFTER: Duration = Duration::from_millis(1_000);
const BOOT_LIMIT: Duration = Duration::from_secs(60);
const CHECK_LIMIT: Duration = Duration::from_secs(60);
/// How long a program may take until it has done something.
const WORK_LIMIT: Duration = Duration::from_secs(120);
const LOOK_EVERY: Duration = Duration::from_millis(100);
const WEB_PORT: u16 = 80;

/// Guests that are being followed over connections held throughout.
pub(super) struct Watch<'a> {
    lab: &'a Lab,
    beat: BeatListener,
    /// Of the first guest; it counts what all do together.
    progress: Progress,
    /// The other guests'.
    others: Vec<Progress>,
    /// How long the pace was watched before anything happens.
    before: Duration,
    /// Where the guest is a web server: asks it for pages, and sees through which host its beat comes.
    web: Option<(WebClient, BeatRecorder)>,
    /// The guest counts nothing, so that its pace is that of its beat.
    paced_by_beat: bool,
    /// In a burst: what the guest shares its core with, until it has left host a.
    crowd: Option<Process>,
    /// How long it is watched afterwards.
    after: Duration,
}

/// The time from the request to the guest running at the target.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span {
    pub(crate) started: SystemTime,
    pub(crate) ended: SystemTime,
}

impl<'a> Watch<'a> {
    /// Waits until the guests have booted and their pace is known.
    pub(super) fn start(stage: &Stage<'a>, beat: BeatListener) -> Result<Watch<'a>> {
        let lan = stage.lab.namespace(Place::Lan);
        let meet = |guest| {
            Progress::connect(&lan, guest_address(guest), BOOT_LIMIT).context("the guest has not booted")
        };
        let progress = meet(0)?;
        let others = (1..stage.load.guests()).map(meet).collect::<Result<_>>()?;
        let is_build = matches!(stage.load, Load::Build { .. });
        let before = if is_build { BEFORE_BUILD } else { BEFORE };
        let after = if stage.is_burst { AFTER_BURST } else { AFTER };
        let (web, crowd, paced_by_beat) = (None, None, false);
        let mut watch =
            Watch { lab: stage.lab, beat, progress, others, before, web, paced_by_beat, crowd, after };
        if let Some(program) = stage.load.program() {
            if program.serves_web {
                let recorder = BeatRecorder::beside(stage.lab, &watch.beat)?;
                let client = WebClient::start(&lan, (GUEST_ADDRESS, WEB_PORT).into())?;
                watch.web = Some((client, recorder));
            }
            watch.await_work().with_context(|| format!("{} doesn't work", program.name))?;
        }
        if stage.is_burst {
            let mut command = Command::new("busybox");
            watch.crowd =
                Some(stage.lab.spawn(Place::A, "crowd", command.args(["sh", "-c", CROWD]), true)?);
        }
        sleep(before + AFTER);
        watch.paced_by_beat = watch.progress.writes() == 0;
        Ok(watch)
    }

    /// Waits until the guest's program has done something.
    fn await_work(&self) -> Result<()> {
        let started = Instant::now();
        while self.progress.writes() == 0 {
            if started.elapsed() >= WORK_LIMIT {
                bail!("nothing was done within {} s", WORK_LIMIT.as_secs());
            }
            sleep(LOOK_EVERY);
        }
        Ok(())
    }

    /// What the link has carried so far.
    pub(super) fn wire_bytes(&self) -> Result<WireBytes> {
        Ok(self.lab.wire_bytes()?)
    }

    /// Draws up the account of a contender.
    pub(super) fn outcome(
        &mut self,
        contender: &'static str,
        span: Span,
        before: WireBytes,
    ) -> Result<Outcome> {
        // At host b the guest has its core to itself.
        self.crowd.take().map_or(Ok(()), |mut crowd| crowd.kill())?;
        sleep(self.after);
        let usual = self.pace(span.started - self.before, span.started);
        let during = self.pace(span.started, span.ended);
        if let (Some(usual), Some(during)) = (usual, during) {
            println!("  the guest's pace: {usual:.1} a second before, {during:.1} during");
        }
        Ok(Outcome {
            contender,
            converged: false,
            wire_bytes: self.wire_bytes()?.since(before).total(),
            total_ms: milliseconds(span.started, span.ended),
            downtime_ms: None,
            worst_downtime_ms: None,
            guest_progress_ratio: usual
                .zip(during)
                .map(|(usual, during)| during / usual)
                .filter(|ratio| ratio.is_finite()),
            memory_digest_equal: None,
            largest_beat_gap: self.beat.largest_gap(span.started, span.ended + AFTER / 2),
            span,
            floor_bytes: None,
            responses: self.responses(span),
            predicted: Forecast::default(),
            reported: Account::default(),
            report: None,
        })
    }

    /// What the clients of the guest's web server saw.
    fn responses(&self, span: Span) -> Option<Responses> {
        let (client, recorder) = self.web.as_ref()?;
        let no_pause = Span { started: span.ended, ended: span.ended };
        let pause = crossing(&recorder.take()).unwrap_or(no_pause);
        Responses::of(&client.exchanges(), span.started - self.before, span, pause)
    }

    /// Writes, or beats, a second.
    fn pace(&self, from: SystemTime, to: SystemTime) -> Option<f64> {
        if self.paced_by_beat { self.beat.rate(from, to) } else { self.progress.rate(from, to) }
    }

    /// Has the guests check their memory against all they ever wrote; returns the first one's account.
    pub(super) fn check(&self) -> Result<String> {
        self.others.iter().try_for_each(|guest| guest.check(CHECK_LIMIT).map(|_| ()))?;
        Ok(self.progress.check(CHECK_LIMIT)?)
    }
}

/// From the last beat through host a to the first one through host b; `None`: the guest isn't there.
fn crossing(beats: &[Beat]) -> Option<Span> {
    let first = beats.iter().position(|beat| beat.from == Place::B)?;
    let last = first.checked_sub(1)?;
    Some(Span { started: beats[last].at, ended: beats[first].at })
}

/// Milliseconds from one moment to a later one.
pub(super) fn milliseconds(earlier: SystemTime, later: SystemTime) -> f64 {
    later.duration_since(earlier).unwrap_or_default().as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_crosses_between_its_last_beat_here_and_its_first_there() {
        let at = |milliseconds| SystemTime::UNIX_EPOCH + Duration::from_millis(milliseconds);
        let beat = |number, from, milliseconds| Beat { number, boot: 9, from, at: at(milliseconds) };
        let beats =
            [beat(1, Place::A, 10), beat(2, Place::A, 90), beat(3, Place::B, 130), beat(4, Place::B, 400)];
        let span = crossing(&beats).unwrap();
        assert_eq!((span.started, span.ended), (at(90), at(130)));
        assert!(crossing(&beats[..2]).is_none() && crossing(&beats[2..]).is_none());
    }
}
