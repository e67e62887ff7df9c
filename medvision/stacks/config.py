"""Settings of the slice stacks that a network sees."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator


class StackConfig(BaseModel):
    """How a volume becomes the channels of a 2-D network."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_slices: int = Field(
        7, ge=1, le=31, description="slices in a stack; odd, the middle one counts"
    )
    slice_offset_mm: float = Field(
        2.5, gt=0, description="distance between neighbours in a stack, mm"
    )
    pixel_mm: float | None = Field(
        None, gt=0, description="in-plane pixel size the network sees, mm; none: median of the data"
    )
    window_hu: tuple[float, float] | None = Field(
        (-1000.0, 400.0),
        description="values taken to 0 and 1; none: 0.5 and 99.5 percent of a scan",
    )

    @field_validator("n_slices")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("n_slices must be odd, so that one slice is the middle")
        return value

    @field_validator("window_hu")
    @classmethod
    def _rising(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not value[0] < value[1]:
            raise ValueError("window_hu must be low, high with low < high")
        return value
