//! The scan-time advisor: how many pages the next batch may look at.
//!
//! After each full scan it compares the time that the scan took with the time that it should take,
//! smooths the trend, and stays within a share of one CPU. Integer arithmetic throughout; all
//! divisions truncate, as the kernel's do, so that the same inputs give the same `pages_to_scan`.
//!
//! # Departures from ksmd
//! The result saturates at 32 bits where the kernel cuts the upper ones off.

use crate::{Clock, Settings, Tick};

/// Per cent of one CPU that a scan may always use. Not a setting in the kernel either.
const MIN_CPU: u128 = 10;
/// Weight of the newest value in the moving average, in per cent.
const EWMA_WEIGHT: u128 = 30;

/// What the advisor remembers between scans. All zero when it is switched on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Advisor {
    started: Tick,
    change: u128,
    scan_time: u128,
    cpu_nanos: u64,
}

/// What it found and decided, as the trace event shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Advice {
    pub(crate) scan_time: u64,
    pub(crate) pages_to_scan: u32,
    pub(crate) cpu_percent: u32,
}

impl Advisor {
    pub(crate) fn scan_starts(&mut self, clock: Clock) {
        self.started = clock.now;
    }

    pub(crate) fn scan_stops(
        &mut self,
        settings: &Settings,
        pages_to_scan: u32,
        clock: Clock,
    ) -> Advice {
        let now_pages = u128::from(pages_to_scan);
        let seconds = (u128::from(clock.now.0.saturating_sub(self.started.0)) / 1000).max(1);
        let cpu_ms = u128::from(clock.cpu_nanos.saturating_sub(self.cpu_nanos)) / 1_000_000;
        let cpu = (cpu_ms * 100 / (seconds * 1000)).max(1);
        let last = if self.scan_time == 0 {
            seconds
        } else {
            self.scan_time
        };
        let factor = (u128::from(settings.advisor_target_scan_time) * 100 / seconds).max(1);
        let trend = (seconds * 100 / last).max(1);
        let change = ((100 - EWMA_WEIGHT) * self.change + EWMA_WEIGHT * trend) / 100;

        let cost = (now_pages / cpu).max(1);
        let pages = (now_pages * 100 / factor * change / 100)
            .min(cost * u128::from(settings.advisor_max_cpu))
            .max(cost * MIN_CPU)
            .min(u128::from(settings.advisor_max_pages_to_scan));

        self.change = change;
        self.scan_time = seconds;
        self.cpu_nanos = clock.cpu_nanos;
        Advice {
            scan_time: u64::try_from(seconds).unwrap_or(u64::MAX),
            pages_to_scan: u32::try_from(pages).unwrap_or(u32::MAX),
            cpu_percent: u32::try_from(cpu).unwrap_or(u32::MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(target: u64, scans: &[(u64, u64)]) -> Vec<u32> {
        // Each scan: seconds it takes, CPU per cent it uses.
        let settings = Settings {
            advisor_target_scan_time: target,
            ..Settings::kernel_defaults()
        };
        let mut advisor = Advisor::default();
        let mut clock = Clock::default();
        let mut pages = 500;
        let mut seen = Vec::new();
        for &(seconds, cpu) in scans {
            advisor.scan_starts(clock);
            clock.now.0 += seconds * 1000;
            clock.cpu_nanos += cpu * seconds * 10_000_000;
            pages = advisor.scan_stops(&settings, pages, clock).pages_to_scan;
            seen.push(pages);
        }
        seen
    }

    #[test]
    fn advisor_worked_example_of_one_second_gives_the_kernels_values() {
        let scans = [(1, 3793), (1, 1), (1, 1), (1, 1), (1, 1)];
        assert_eq!(run(1, &scans), [70, 700, 7000, 30_000, 30_000]);
    }

    #[test]
    fn advisor_worked_example_of_two_seconds_gives_the_kernels_value() {
        assert_eq!(run(2, &[(4, 970)]), [70]);
    }

    #[test]
    fn advisor_first_cpu_percent_is_that_of_the_whole_life() {
        let mut advisor = Advisor::default();
        let clock = |ms, cpu_nanos| Clock {
            now: Tick(ms),
            cpu_nanos,
        };
        advisor.scan_starts(clock(5000, 37_930_000_000));
        let advice = advisor.scan_stops(
            &Settings::kernel_defaults(),
            500,
            clock(6000, 37_930_000_000),
        );
        assert_eq!((advice.scan_time, advice.cpu_percent), (1, 3793));
    }

    #[test]
    fn advisor_extreme_settings_do_not_overflow() {
        let settings = Settings {
            advisor_target_scan_time: u64::MAX,
            advisor_max_pages_to_scan: u64::MAX,
            advisor_max_cpu: u32::MAX,
            ..Settings::kernel_defaults()
        };
        let mut advisor = Advisor::default();
        let clock = Clock {
            now: Tick(u64::MAX),
            cpu_nanos: 0,
        };
        let advice = advisor.scan_stops(&settings, u32::MAX, clock);
        assert_eq!(advice.pages_to_scan, u32::MAX);
    }
}
